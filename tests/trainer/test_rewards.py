"""The reward layer: each kind of signal, signals that fail, and what is said of them."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.spec.methods import RewardPart
from hone_trainer.context import RunContext
from hone_trainer.failure import RunFailed
from hone_trainer.inputs import Inputs, fetch
from hone_trainer.report import EventLog
from hone_trainer.rewards import Answer, Rewards, scorer
from hone_trainer.rewards.texts import last_number

from .conftest import Attempt, MakeAttempt, RunHere, make_tokenizer, preferences, reversals, write_rows


@pytest.fixture
def load(make_attempt: MakeAttempt, tmp_path: Path) -> Iterator[Callable[..., tuple[Rewards, Attempt]]]:
    """Opens the signals of a request, as a worker would."""
    opened: list[Rewards] = []

    def make(*parts: Mapping[str, Any]) -> tuple[Rewards, Attempt]:
        rows = write_rows(tmp_path / "prompts.jsonl", reversals(8))
        changes = {
            "dataset": {"source": f"file://{rows}"},
            "method": {"sft": None, "ppo": {"rewards": list(parts), "batch_size": 4}},
        }
        attempt = make_attempt(changes)
        directory = attempt.directory
        directory.scratch.mkdir(exist_ok=True)
        fetch(attempt.run, directory.scratch / "inputs").write(directory.scratch / "inputs.json")
        inputs = Inputs.read(directory.scratch / "inputs.json")
        log = EventLog(directory.events)
        context = RunContext(run=attempt.run, directory=directory, inputs=inputs, events=log, rank=0, world_size=1)
        ppo = attempt.run.spec.method.ppo
        assert ppo is not None
        opened.append(Rewards.load(context, ppo.rewards, device=torch.device("cpu")))
        return opened[-1], attempt

    yield make
    for rewards in opened:
        rewards.close()


def answers(*texts: str, row: Mapping[str, Any] | None = None, tokens: int = 5) -> list[Answer]:
    return [Answer(prompt="q = ", text=text, num_tokens=tokens, row=row or {"right": "42"}) for text in texts]


Load = Callable[..., tuple[Rewards, Attempt]]
SCHEMA = json.dumps({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}})


@pytest.mark.parametrize(
    ("part", "text", "score"),
    [
        ({"answer": {"column": "right"}}, " 42\n", 1),
        ({"answer": {"column": "right"}}, "it is 42", 0),
        ({"answer": {"column": "right", "numeric": True}}, "first 7, then 42.0.", 1),
        ({"answer": {"column": "right", "numeric": True}}, "42, or 43", 0),
        ({"answer": {"column": "right", "numeric": True, "tolerance": 1}}, "42, or 43", 1),
        ({"answer": {"column": "right", "numeric": True}}, "none", 0),
        ({"regex": {"pattern": r"^\d+$"}}, "123", 1),
        ({"regex": {"pattern": r"^\d+$"}}, "12a", 0),
        ({"json_schema": {"schema_text": SCHEMA}}, '{"a": 1}', 1),
        ({"json_schema": {"schema_text": SCHEMA}}, '{"a": "1"}', 0),
        ({"json_schema": {"schema_text": SCHEMA}}, "{", 0),
        ({"json_schema": {"schema_text": SCHEMA}}, "[" * 100_000, 0),
        ({"length": {"max_tokens": 5}}, "x", 0),
        ({"length": {"max_tokens": 4}}, "x", -0.25),
        ({"length": {"max_tokens": 1}}, "x", -1),
    ],
)
def test_a_rule_scores_a_text(load: Load, part: dict[str, Any], text: str, score: float) -> None:
    rewards, _ = load(part)
    assert rewards.score(answers(text), step=1).total.tolist() == [score]


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234.5 apples", 1234.5), ("-3", -3), ("x = 2e3", 2000), ("#### 18", 18), (".5", 0.5), ("a", None)],
)
def test_the_last_number_of_a_text_is_found(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_the_total_is_the_weighted_sum_and_every_part_is_told(load: Load) -> None:
    regex = {"regex": {"pattern": "a"}, "weight": 2.0}
    rewards, _ = load(
        regex, {"regex": {"pattern": "b"}, "weight": -0.5}, {"answer": {"column": "right"}, "weight": 0.0}
    )
    assert rewards.names == ("regex", "regex_2", "answer") and rewards.gold == ("answer",)
    found = rewards.score(answers("ab", "a", "42"), step=1)
    assert found.total.tolist() == [1.5, 2.0, 0.0]
    assert {name: values.tolist() for name, values in found.parts.items()} == {
        "regex": [1, 1, 0],
        "regex_2": [1, 0, 0],
        "answer": [0, 0, 1],
    }


def test_a_column_that_is_not_there_ends_the_run_with_its_name(load: Load) -> None:
    rewards, _ = load({"answer": {"column": "wanted"}})
    with pytest.raises(RunFailed, match=r"method.ppo.rewards.0.answer needs the column wanted, and a row has right"):
        rewards.score(answers("a"), step=1)


def test_a_pattern_that_takes_for_ever_is_ended(load: Load) -> None:
    rewards, attempt = load({"regex": {"pattern": r"^(a|aa)+$"}, "on_error": "zero"}, {"regex": {"pattern": "a"}})
    began = time.monotonic()
    found = rewards.score(answers("a" * 60 + "b"), step=3)
    assert time.monotonic() - began < 30
    assert found.total.tolist() == [1.0]
    [warning] = attempt.events("warning")
    assert (
        warning.message == "method.ppo.rewards.0.regex took more than 1 s on one answer: it counts 0 for these answers."
    )


def test_a_schema_fetches_nothing_and_its_pattern_is_ended_too(load: Load) -> None:
    rewards, _ = load({"json_schema": {"schema_text": '{"$ref": "https://example.org/schema"}'}})
    with pytest.raises(RunFailed, match=r"json_schema refers to https://example.org/schema, which is not in it"):
        rewards.score(answers("{}"), step=1)
    slow = json.dumps({"type": "string", "pattern": "^(a|aa)+$"})
    rewards, _ = load({"json_schema": {"schema_text": slow}})
    with pytest.raises(RunFailed, match=r"json_schema took more than 1 s on one answer"):
        rewards.score(answers(json.dumps("a" * 60 + "b")), step=1)
    assert rewards.score(answers('"aaa"', '"ab"', "3"), step=1).total.tolist() == [1, 0, 0]


def test_a_signal_that_always_says_the_same_is_named_once(load: Load) -> None:
    rewards, attempt = load({"regex": {"pattern": "z"}}, {"length": {"max_tokens": 50}, "weight": 1})
    for step in range(8):
        rewards.score(answers(*"abcdefgh"), step=step)
    texts = [event.message for event in attempt.events("warning")]
    assert texts == [
        "method.ppo.rewards.0.regex has given every one of 40 answers 0: nothing is learned from it.",
        "method.ppo.rewards.1.length has given every one of 40 answers 0: nothing is learned from it.",
    ]


def test_a_schema_that_is_none_is_refused_before_training(load: Load) -> None:
    with pytest.raises(RunFailed, match=r"method.ppo.rewards.0.json_schema.schema_text is not a JSON Schema"):
        load({"json_schema": {"schema_text": '{"type": 7}'}})


class Service:
    """A scorer on this machine that does what a test tells it."""

    def __init__(self, behave: Callable[[dict[str, Any], int], tuple[int, bytes] | None]) -> None:
        self.asked: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                self.asked.append(body)
                answer = behave(body, len(self.asked))
                if answer is None:  # dies in the middle
                    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
                    handler.close_connection = True
                    return
                handler.send_response(answer[0])
                handler.send_header("Content-Length", str(len(answer[1])))
                handler.end_headers()
                handler.wfile.write(answer[1])

            def log_message(handler, *_arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    monkeypatch.setattr(scorer, "PAUSE_S", 0.01)
    running: list[Service] = []

    def make(behave: Callable[[dict[str, Any], int], tuple[int, bytes] | None]) -> Service:
        running.append(Service(behave))
        return running[-1]

    yield make
    for service in running:
        service.close()


def lengths(body: dict[str, Any], _call: int) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": [len(text) for text in body["answers"]]}).encode()


def test_a_scorer_gets_prompts_answers_and_rows_in_batches(load: Load, serve: Callable[..., Service]) -> None:
    service = serve(lengths)
    rewards, _ = load({"http": {"url": service.url, "max_batch": 2}})
    found = rewards.score(answers("a", "bb", "ccc", row={"tests": "x"}), step=1)
    assert found.total.tolist() == [1, 2, 3]
    assert [len(asked["answers"]) for asked in service.asked] == [2, 1]
    assert service.asked[0] == {"prompts": ["q = "] * 2, "answers": ["a", "bb"], "rows": [{"tests": "x"}] * 2}


def test_a_scorer_that_recovers_is_asked_again(load: Load, serve: Callable[..., Service]) -> None:
    service = serve(lambda body, call: (503, b"busy") if call < 3 else lengths(body, call))
    rewards, attempt = load({"http": {"url": service.url}})
    assert rewards.score(answers("abc"), step=1).total.tolist() == [3]
    assert len(service.asked) == 3 and not attempt.directory.events.read_text()


def slow(body: dict[str, Any], call: int) -> tuple[int, bytes]:
    time.sleep(1.5)
    return lengths(body, call)


@pytest.mark.parametrize(
    ("behave", "text", "calls"),
    [
        (lambda _body, _call: (500, b"Traceback\n  here"), "answered 500: Traceback here", 4),
        (lambda _body, _call: None, "cannot be reached at", 4),
        (slow, "did not answer within 1 s", 4),
        (lambda _body, _call: (404, b""), "answered 404", 1),
        (lambda _body, _call: (200, b"<html>"), 'answered something that is not {"scores": [numbers]}', 1),
        (lambda _body, _call: (200, b'{"scores": [true]}'), 'answered something that is not {"scores": [numbers]}', 1),
        (lambda _body, _call: (200, b'{"scores": 3}'), 'answered something that is not {"scores": [numbers]}', 1),
        (lambda _body, _call: (200, b'{"scores": [1, 2]}'), "gave 2 scores for 1 answers", 1),
        (lambda _body, _call: (200, b'{"scores": [NaN]}'), "gave a score that is no finite number (nan)", 1),
    ],
    ids=["500", "dies", "hangs", "404", "html", "bool", "no list", "count", "nan"],
)
def test_a_scorer_that_misbehaves_ends_the_run_or_counts_nothing_as_asked(
    load: Load, serve: Callable[..., Service], behave: Any, text: str, calls: int
) -> None:
    service = serve(behave)
    rewards, _ = load({"http": {"url": service.url, "timeout": 1}})
    with pytest.raises(RunFailed) as caught:
        rewards.score(answers("abc"), step=1)
    assert str(caught.value).startswith("method.ppo.rewards.0.http ") and text in str(caught.value)
    assert caught.value.fix and len(service.asked) == calls

    rewards, attempt = load(
        {"http": {"url": service.url, "timeout": 1}, "on_error": "zero"}, {"regex": {"pattern": "b"}}
    )
    for step in range(2):
        assert rewards.score(answers("abc"), step=step).total.tolist() == [1.0]
    [warning] = attempt.events("warning")
    assert text in warning.message and warning.message.endswith("it counts 0 for these answers.")


def test_a_scorer_that_nobody_runs_is_named_with_its_address(load: Load, serve: Callable[..., Service]) -> None:
    service = serve(lengths)
    service.close()
    rewards, _ = load({"http": {"url": service.url}})
    with pytest.raises(RunFailed, match=rf"cannot be reached at {service.url}: .*[Rr]efused"):
        rewards.score(answers("abc"), step=1)


@pytest.fixture
def reward_model(make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path) -> Path:
    """The adapter that the reward method leaves."""
    pairs = write_rows(tmp_path / "pairs.jsonl", preferences(16))
    ran = run_here(
        make_attempt({"method": {"sft": None, "reward": {}}, "dataset": {"source": f"file://{pairs}"}}, job="judge")
    )
    return ran.directory.scratch / "outputs" / "adapter"


def test_a_reward_model_scores_as_plain_peft_does(load: Load, reward_model: Path, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    rewards, _ = load({"model": {"source": f"file://{reward_model}"}})
    texts = ["a", "bcd", "efghij"]
    found = rewards.score(answers(*texts), step=1)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = 2
    plain = PeftModel.from_pretrained(base, str(reward_model)).eval()
    tokenizer = make_tokenizer()
    with torch.no_grad():
        wanted = [
            plain(torch.tensor([[*tokenizer(f"q = {text}")["input_ids"], tokenizer.eos_token_id]])).logits[0, 0].item()
            for text in texts
        ]
    assert found.total.tolist() == pytest.approx(wanted, abs=1e-5)
    assert len(set(wanted)) == 3


def test_what_is_too_long_for_a_reward_model_is_said_and_its_end_is_scored(load: Load, reward_model: Path) -> None:
    rewards, attempt = load({"model": {"source": f"file://{reward_model}", "max_length": 8}})
    found = rewards.score(answers("x" * 40 + "abc", "y" * 60 + "xxxabc"), step=1)
    assert found.total[0] != 0 and len(found.total) == 2
    [warning] = attempt.events("warning")
    assert "the reward model sees the last 8 of them" in warning.message


def test_a_language_model_is_no_reward_model(load: Load, tiny_model: Path) -> None:
    with pytest.raises(RunFailed, match=r"method.ppo.rewards.0.model.source: .* is a language model"):
        load({"model": {"source": f"file://{tiny_model}"}})


def test_a_part_says_what_it_is() -> None:
    with pytest.raises(ValueError, match="takes exactly one of model, answer, regex"):
        RewardPart.model_validate({"weight": 1.0})
