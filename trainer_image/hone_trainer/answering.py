"""The process that answers prompts for `hone try`: JSON lines in, JSON lines out. trial.py becomes it, with everything
on this machine's disk.

    → {"id": 7, "model": "base", "prompt": "…", "system": null, "max_new_tokens": 256, "temperature": 0.0, "seed": null}
    → {"stop": 7}                        end the answer 7 here
    ← {"ready": {"models": [{"name", "kind", "chat"}], "notes": […], "device": "cpu"}}
    ← {"id": 7, "piece": " text"}        as it comes
    ← {"id": 7, "answer": {"text", "tokens", "ended_by", "seconds"}}
    ← {"id": 7, "failure": {…}}, or without an id where nothing can be answered at all

The end of stdin ends it, and so does the end of its parent.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from hone.run import TrainerExit
from hone_trainer import encoding
from hone_trainer.failure import RunFailed, classify, failure_of, failure_to_json
from hone_trainer.guard import forbid_network
from hone_trainer.process import die_with_parent
from hone_trainer.trial import Wanted, say
from hone_trainer.voices import Voice, Voices, load

_CUT = "\ufffd"
"""What a part of a character decodes to."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt for one model."""

    id: int
    model: str
    prompt: str
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token at each step."""
    seed: int | None = None


class Requests:
    """What comes on stdin, read beside the answering so that an answer can be stopped."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Request] = SimpleQueue()
        self._stopped = 0
        threading.Thread(target=self._read, name="requests", daemon=True).start()

    def is_stopped(self, request: Request) -> bool:
        """Whether its answer, or a later one, was to end."""
        return self._stopped >= request.id

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if "stop" in message:
                self._stopped = message["stop"]
            else:
                self.queue.put(Request(**message))
        os._exit(int(TrainerExit.SUCCEEDED))  # nobody listens any more, whatever is being computed


class Pieces:
    """Text of an answer as soon as it is whole characters: what transformers calls a streamer."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._tell, self._told, self._ids = tokenizer, tell, "", list[int]()
        self._is_prompt = True

    def put(self, tokens: Any) -> None:
        """The prompt first, then what is generated."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += tokens.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith(_CUT) and text.startswith(self._told):
            self._advance(text)

    def end(self) -> None:
        """Nothing: the answer as a whole follows, with what was left out here."""

    def _advance(self, text: str) -> None:
        if piece := text[len(self._told) :]:
            self._tell(piece)
        self._told = text


def main(path: Path) -> int:
    """Load everybody and answer until stdin ends."""
    die_with_parent()
    _keep_stdout()
    forbid_network()
    try:
        voices = _load(path)
        torch.seed()
    except BaseException as error:
        failed = _failed(error)
        say({"failure": failure_to_json(failure_of(failed))})
        return int(failed.code)
    requests = Requests()
    models = [{"name": one.name, "kind": one.kind, "chat": one.is_chat} for one in voices.by_name.values()]
    say({"ready": {"models": models, "notes": voices.notes, "device": voices.device}})
    while True:
        _serve(voices, requests.queue.get(), requests)


def _serve(voices: Voices, request: Request, requests: Requests) -> None:
    try:
        found = answer(
            voices.by_name[request.model],
            request,
            is_stopped=lambda: requests.is_stopped(request),
            tell=lambda piece: say({"id": request.id, "piece": piece}),
        )
        say({"id": request.id, "answer": found})
    except Exception as error:
        say({"id": request.id, "failure": failure_to_json(failure_of(_failed(error)))})


@torch.no_grad()
def answer(
    voice: Voice, request: Request, *, is_stopped: Callable[[], bool], tell: Callable[[str], None]
) -> Mapping[str, Any]:
    """The answer of one model, told in pieces too. Raises RunFailed (USER) for a prompt that it cannot take."""
    begin = time.monotonic()
    ids = torch.tensor([prompt_ids(voice, request)], device=voice.model.device)
    room = _room(voice, ids.shape[1])
    if request.seed is not None:
        torch.manual_seed(request.seed)
    with voice.speaking() as model:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_sampling(voice, request, room),
            streamer=Pieces(voice.tokenizer, tell),
            stopping_criteria=[lambda ids, _scores, **_: torch.full((len(ids),), is_stopped(), device=ids.device)],
        )
    found = out[0, ids.shape[1] :].tolist()
    return {
        "text": voice.tokenizer.decode(found, skip_special_tokens=True),
        "tokens": len(found),
        "ended_by": _ended_by(voice, found, is_stopped=is_stopped()),
        "seconds": round(time.monotonic() - begin, 3),
    }


def prompt_ids(voice: Voice, request: Request) -> list[int]:
    """The prompt as the model sees it: a conversation by its template, else the text as training would see it."""
    if voice.is_chat:
        return _rendered(voice, request)
    if request.system is not None:
        raise RunFailed(
            TrainerExit.USER, f"{voice.name} gets prompts as they are, and there is no place for a system prompt."
        )
    ids = encoding.prompt_ids(voice.tokenizer, request.prompt)
    if not ids:
        raise RunFailed(TrainerExit.USER, "The prompt is empty.")
    return ids


def _rendered(voice: Voice, request: Request) -> list[int]:
    system = [{"role": "system", "content": request.system}] if request.system is not None else []
    messages = [*system, {"role": "user", "content": request.prompt}]
    try:
        return encoding.asked_ids(voice.tokenizer, messages)
    except encoding.TemplateRefused as error:
        raise RunFailed(
            TrainerExit.USER, f"The chat template of {voice.name} does not take this: {error.why}"
        ) from error


def _room(voice: Voice, num_tokens: int) -> int | None:
    """Tokens that the model has places for, after the prompt; None where its configuration does not say."""
    places = getattr(voice.model.config.get_text_config(), "max_position_embeddings", None)
    if places is not None and num_tokens >= places:
        raise RunFailed(
            TrainerExit.USER, f"The prompt has {num_tokens:,} tokens, and {voice.name} has {places:,} places in all."
        )
    return places - num_tokens if places is not None else None


def _sampling(voice: Voice, request: Request, room: int | None) -> Any:
    """Everything is set: the likeliest token at each step, or one drawn from the whole distribution."""
    from transformers import GenerationConfig

    drawn = {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        max_new_tokens=min(request.max_new_tokens, room or request.max_new_tokens),
        pad_token_id=voice.tokenizer.pad_token_id,
        eos_token_id=_stops(voice),
        **(drawn if request.temperature else {"do_sample": False}),
    )


def _stops(voice: Voice) -> list[int]:
    return list(dict.fromkeys([voice.tokenizer.eos_token_id, *voice.model.generation_config.eos_token_id]))


def _ended_by(voice: Voice, ids: list[int], *, is_stopped: bool) -> str:
    if ids and ids[-1] in _stops(voice):
        return "stop"
    return "interrupt" if is_stopped else "length"


def _load(path: Path) -> Voices:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(Wanted.from_json(path.read_text(encoding="utf-8")))


def _failed(error: BaseException) -> RunFailed:
    """The fixes of runs that train are none here."""
    failed = classify(error)
    if failed.code == TrainerExit.INTERNAL:
        traceback.print_exception(error)
        return RunFailed(failed.code, failed.message, fix="Report it as a bug.")
    if failed.code == TrainerExit.OUT_OF_MEMORY:
        return RunFailed(failed.code, failed.message, fix="Try the jobs one by one, or ask for fewer tokens.")
    return failed


def _keep_stdout() -> None:
    """Stdout is for messages alone: what libraries print goes to stderr."""
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(code)
