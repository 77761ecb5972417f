"""The push at the end of a run: what of a real run comes to a Hub, and what is told of a push that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hone_trainer.publish import Publisher
from hone_trainer.push import push_output, tell_pushed, warn_without_token
from hone_trainer.report import EventLog
from hone_trainer.stop import Stop

from ..integration.hub_server import Hub, run_hub
from .conftest import Attempt, MakeAttempt, write_rows

TOKEN = "canary-hub-token"


def run(attempt: Attempt, hub: Hub) -> str:
    """The trainer's own process; what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": f"{TOKEN}\n", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hone_trainer", "run", str(attempt.directory.path)]
    done = subprocess.run(command, env=kept | own, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done
    return done.stdout + done.stderr


def test_a_merged_model_comes_to_a_branch_with_its_card_and_without_paths_or_tokens(
    make_attempt: MakeAttempt, tmp_path: Path, tiny_model: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    changes = {
        "dataset": {"eval_fraction": 0.125},
        "training": {"eval": {"at_start": True}},
        "output": {"merged": True, "hub": {"repo": "org/name", "branch": "v1", "private": False}},
    }
    attempt = make_attempt(changes)
    with run_hub() as hub:
        hub.tokens = {TOKEN: {"org"}}
        printed = run(attempt, hub)
        pushed = hub.model().files("v1")
        assert (hub.model().private, hub.model().commits("v1"), hub.model().files()) == (False, 1, {})
        written = [hub.all_bytes(), printed.encode(), attempt.directory.events.read_bytes()]
    stored = {file.name: file.read_bytes() for file in (attempt.store / "merged").iterdir()}
    assert pushed == {name: data for name, data in stored.items() if name != "MANIFEST.json"}
    assert not [name for name, data in pushed.items() if str(tmp_path.parent).encode() in data]
    assert not [data for data in [*written, (attempt.store / "result.json").read_bytes()] if b"canary" in data]
    assert attempt.result()["hub"] == {
        "repo": "org/name",
        "what": "merged",
        "branch": "v1",
        "private": False,
        "url": attempt.result()["hub"]["url"],
        "commit": attempt.result()["hub"]["commit"],
    }
    urls = [event.fields["url"] for event in attempt.events("note") if "url" in event.fields]
    assert len(urls) == 1 and urls[0].endswith("/org/name/tree/v1")

    card = pushed["README.md"].decode()
    loss = attempt.result()["metrics"]["eval_after"]["eval_loss"]
    for words in (
        "- base: tiny\n",
        "- data: train.jsonl, split train\n",
        "- trained on 56 of 56 rows",
        "- evaluated on 8 rows: rows held out of the same data",
        "- learning rate 0.01, cosine, seed 42, 4 rows a step, max_length 64",
        "- LoRA rank 4, alpha 32",
        "- 4 steps, training loss",
        f" → {loss:.4g}\n",
        "from the model as trained",
    ):
        assert words in card, card
    copy = tmp_path / "fetched"
    copy.mkdir()
    for name, data in pushed.items():
        (copy / name).write_bytes(data)
    assert AutoModelForCausalLM.from_pretrained(copy).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(copy).eos_token == "</s>"


def test_an_adapter_on_the_hub_names_its_local_base_by_its_bare_name(make_attempt: MakeAttempt, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "few.jsonl", [{"prompt": "a", "completion": "b"}] * 8)
    changes = {"dataset": {"source": f"file://{rows}"}, "training": {"max_steps": 1}}
    attempt = make_attempt({**changes, "output": {"hub": {"repo": "org/name"}}})
    with run_hub() as hub:
        hub.tokens = {TOKEN: {"org"}}
        run(attempt, hub)
        pushed, private = hub.model().files(), hub.model().private
    assert private
    assert json.loads(pushed["hone_base.json"])["source"] == "tiny"
    assert json.loads((attempt.store / "adapter" / "hone_base.json").read_text())["source"].startswith("file://")
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= pushed.keys()
    assert not [name for name, data in pushed.items() if str(tmp_path.parent.parent).encode() in data]


@pytest.fixture
def published(make_attempt: MakeAttempt, monkeypatch: pytest.MonkeyPatch) -> tuple[Attempt, Publisher, EventLog]:
    """An attempt that asks for a push, and whose outputs are in the store; there is no token."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    attempt = make_attempt({"output": {"hub": {"repo": "org/name"}}})
    events = EventLog(attempt.directory.events)
    publisher = Publisher(attempt.run, events, environment={})
    scratch = attempt.directory.scratch
    (scratch / "outputs" / "adapter").mkdir(parents=True)
    (scratch / "outputs" / "adapter" / "weights").write_text("x")
    (scratch / "worker.json").write_text('{"durations_s": {}}')
    publisher.claim()
    publisher.publish(scratch, seconds=1)
    return attempt, publisher, events


def test_a_push_that_fails_is_a_warning_with_its_fix_and_stands_in_the_record(
    published: tuple[Attempt, Publisher, EventLog],
) -> None:
    attempt, publisher, events = published
    before = attempt.result()
    warn_without_token(attempt.run, events)
    push_output(attempt.run, publisher, events, attempt.directory.scratch / "outputs", Stop())
    early, late = attempt.events("warning")
    assert early.message.startswith("output.hub: HF_TOKEN is not set here, so nothing will be pushed to org/name.")
    assert late.message.startswith("It was not pushed to org/name: There is no token for the Hub: HF_TOKEN is not set.")
    assert late.message.endswith("Next: hone push tiny-1")
    hub = attempt.result()["hub"]
    assert (hub["repo"], hub["what"], hub["error"]) == ("org/name", "adapter", late.fields["error"])
    assert attempt.result() == {**before, "hub": hub}


def test_a_run_that_is_asked_to_stop_while_it_pushes_has_succeeded_all_the_same(
    published: tuple[Attempt, Publisher, EventLog],
) -> None:
    attempt, publisher, events = published
    stop = Stop()
    stop.ask(15, None)
    push_output(attempt.run, publisher, events, attempt.directory.scratch / "outputs", stop)
    assert "asked to stop (SIGTERM)" in attempt.events("warning")[-1].message


def test_results_that_were_there_already_say_what_became_of_their_push(
    published: tuple[Attempt, Publisher, EventLog],
) -> None:
    attempt, publisher, events = published
    tell_pushed(attempt.run, attempt.result(), events)  # it was killed before it could say
    assert "ended before it said so" in attempt.events("warning")[-1].message
    assert attempt.events("warning")[-1].message.endswith("Next: hone push tiny-1")
    publisher.record_push(
        {"repo": "org/name", "what": "adapter", "url": "https://hub/org/name", "commit": "0123456789"}
    )
    tell_pushed(attempt.run, attempt.result(), events)
    assert attempt.events("note")[-1].message == "Its adapter is on the Hub: https://hub/org/name (commit 0123456)."
    assert attempt.events("note")[-1].fields["hub"] == "org/name"


def test_a_record_that_cannot_be_written_any_more_fails_nothing(
    published: tuple[Attempt, Publisher, EventLog], make_attempt: MakeAttempt
) -> None:
    attempt, publisher, events = published
    newer = Publisher(make_attempt(attempt=2).run, events, environment={})
    newer.claim()
    newer.publish(attempt.directory.scratch, seconds=1)
    push_output(attempt.run, publisher, events, attempt.directory.scratch / "outputs", Stop())
    assert (attempt.result()["attempt"], "hub" in attempt.result()) == (2, False)
