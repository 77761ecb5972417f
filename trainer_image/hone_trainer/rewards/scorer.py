"""A signal from a service over HTTP: prompts, answers and rows in, one number an answer out.

    → POST url  {"prompts": [text or messages, …], "answers": [text, …], "rows": [{column: value, …}, …]}
    ← 200       {"scores": [number, …]}

What such a service does is its own affair, running an answer's code included: it is not done here. examples/scorer is
one.
"""

import json
import time
from collections.abc import Sequence

import urllib3

from hone.run import TrainerExit
from hone.spec.methods import HttpPart
from hone_trainer.rewards.answers import Answer, SignalFailed

TRIES, PAUSE_S = 4, 0.5
"""Pauses double: 0.5, 1 and 2 s."""
MAX_BYTES = 16 << 20
"""Of what is answered."""


class Scorer:
    """Asks the service, a batch at a time, and again where that may help."""

    def __init__(self, part: HttpPart) -> None:
        self._part = part
        self._pool = urllib3.PoolManager(retries=False)

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Scores of all answers. Raises SignalFailed after TRIES for a batch."""
        size = self._part.max_batch
        batches = [answers[start : start + size] for start in range(0, len(answers), size)]
        return [score for batch in batches for score in self._scores(batch)]

    def _scores(self, answers: Sequence[Answer]) -> list[float]:
        body = json.dumps(
            {
                "prompts": [answer.prompt for answer in answers],
                "answers": [answer.text for answer in answers],
                "rows": [dict(answer.row) for answer in answers],
            },
            default=str,
        ).encode()
        pause = PAUSE_S
        for left in range(TRIES - 1, -1, -1):
            try:
                return self._once(body, len(answers))
            except SignalFailed as error:
                if not left or error.code == TrainerExit.USER:
                    raise
            time.sleep(pause)
            pause *= 2
        raise AssertionError("the last try returns or raises")

    def _once(self, body: bytes, count: int) -> list[float]:
        url, timeout = self._part.url, self._part.timeout
        try:
            response = self._pool.request(
                "POST",
                url,
                body=body,
                headers={"Content-Type": "application/json"},
                timeout=urllib3.Timeout(total=timeout),
                redirect=False,
                preload_content=False,
            )
            data = response.read(MAX_BYTES + 1)
            response.release_conn()
        except urllib3.exceptions.NewConnectionError as error:  # in some versions a kind of time limit
            raise _unreachable(f"cannot be reached at {url}: {_reason(error)}", "connection") from error
        except urllib3.exceptions.TimeoutError as error:
            raise _unreachable(f"did not answer within {timeout} s", "timeout") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _unreachable(f"cannot be reached at {url}: {_reason(error)}", "connection") from error
        if response.status != 200:
            text = " ".join(data[:200].decode("utf-8", "replace").split())
            failed = _unreachable if response.status >= 500 or response.status == 429 else _refused
            raise failed(f"answered {response.status}{f': {text}' if text else ''}", f"status {response.status}")
        return _read(data, count)


def _read(data: bytes, count: int) -> list[float]:
    try:
        scores = json.loads(data)["scores"]
    except (ValueError, KeyError, TypeError) as error:
        raise _refused('answered something that is not {"scores": [numbers]}', "form") from error
    if not isinstance(scores, list) or not all(map(_is_number, scores)):
        raise _refused('answered something that is not {"scores": [numbers]}', "form")
    if len(scores) != count:
        raise _refused(f"gave {len(scores)} scores for {count} answers", "count")
    return [float(score) for score in scores]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unreachable(message: str, kind: str) -> SignalFailed:
    fix = "Look at the scorer; it was asked four times. With on_error: zero the run goes on without it."
    return SignalFailed(message, kind=kind, code=TrainerExit.PEER_LOST, fix=fix)


def _refused(message: str, kind: str) -> SignalFailed:
    return SignalFailed(message, kind=kind, fix="Correct the scorer; examples/scorer shows what it has to answer.")


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", error)).rpartition("> ")[2] or type(error).__name__
