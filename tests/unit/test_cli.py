"""The command line without a service: options, exit codes, JSON, and how a run is told."""

import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from rich.console import Console

from hone import errors, quantities
from hone.cli import app as application
from hone.cli import prune
from hone.cli.failure import EXIT_CODES, ExitCode, exit_code, tell
from hone.cli.follow import LINE_S, LineDisplay
from hone.cli.story import Story, told
from hone.job import Event, EventType

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)

EVERYWHERE = {"--help"}
OPTIONS = {
    "run": {"--set", "--json", "--server", "--namespace"},
    "plan": {"--set", "--explain", "--compare", "--offline", "--json", "--server", "--namespace"},
    "data": {"--set", "--json"},
    "calibrate": {"--dry-run", "--json"},
    "submit": {
        "--set", "--job-id", "--request-id", "--validate-only", "--json", "--server", "--namespace",
    },
    "render": {"--set", "--config", "--image", "--store", "--model-config", "--with-tenant", "--namespace"},
    "spec": {"--json"},
    "list": {"--filter", "--limit", "--json", "--server", "--namespace"},
    "get": {"--json", "--server", "--namespace"},
    "watch": {"--samples", "--json", "--server", "--namespace"},
    "logs": {"--follow", "--tail", "--rank", "--attempt", "--server", "--namespace"},
    "pause": {"--json", "--server", "--namespace"},
    "resume": {"--json", "--server", "--namespace"},
    "checkpoints": {"--json", "--server", "--namespace"},
    "cancel": {"--json", "--server", "--namespace"},
    "delete": {"--artifacts", "--yes", "--json", "--server", "--namespace"},
    "download": {"--kind", "--json", "--server", "--namespace"},
    "report": {"--output", "--json", "--server", "--namespace"},
    "push": {
        "--repo", "--what", "--branch", "--public", "--dry-run", "--json", "--server", "--namespace",
    },
    "try": {
        "--prompt", "--max-new-tokens", "--temperature", "--seed", "--system", "--chat", "--no-base", "--json",
        "--server", "--namespace",
    },
    "serve": {"--address"},
    "doctor": {"--json"},
    "prune": {"--older-than", "--dry-run", "--yes", "--json"},
    "backup": set(),
}  # fmt: skip
"""Frozen: scripts rely on these names."""

REQUEST = """
name: tiny
model: {source: "hf://mistralai/Mistral-7B-v0.3"}
dataset: {source: "hf://HuggingFaceH4/ultrachat_200k"}
method: {sft: {max_length: 128}}
adapter: {lora: {rank: 16}}
compute: {gpus_per_node: 1, gpu: H100-80GB}
"""


@pytest.fixture
def request_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HONE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HONE_SERVER", raising=False)
    path = tmp_path / "tiny.yaml"
    path.write_text(REQUEST, encoding="utf-8")
    return path


def test_commands_and_options_are_the_frozen_ones() -> None:
    group = typer.main.get_command(application.app)
    found = {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert {name: options - EVERYWHERE for name, options in found.items()} == OPTIONS


@pytest.mark.parametrize("command", [[], *([name] for name in OPTIONS)])
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert application.run([*command, "--help"]) == 0
    assert "Usage: hone" in capsys.readouterr().out


def test_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    application.run(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for code in ExitCode:
        assert f"{int(code)} " in text.partition("Exit codes:")[2]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequest([]), 2),
        (errors.NotServed("x"), 2),
        (errors.WrongState("x"), 2),
        (errors.AlreadyExists("x"), 2),
        (errors.NotFound("x"), 3),
        (errors.Refused("x"), 4),
        (errors.Unavailable("x"), 5),
        (errors.StorageUnavailable("x"), 5),
        (errors.StorageError("x"), 5),
        (errors.IntegrityError("x"), 1),
        (errors.InternalError("x"), 1),
    ],
)
def test_an_errors_type_decides_the_exit_code(error: errors.HoneError, code: int) -> None:
    assert exit_code(error) == code


def test_every_error_has_an_exit_code() -> None:
    def family(kind: type[errors.HoneError]) -> list[type[errors.HoneError]]:
        return [kind, *(low for child in kind.__subclasses__() for low in family(child))]

    for kind in family(errors.HoneError)[1:]:
        if kind.__module__.partition(".")[0] != "hone":
            continue  # the trainer's own, when its tests ran in this process
        assert issubclass(kind, tuple(listed for listed, _ in EXIT_CODES)), kind


def test_a_plan_that_fits_ends_with_0(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert application.run(["plan", str(request_file), "--offline"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Fits on 1 × H100-80GB: ")
    assert "41,943,040 trained (0.58 %)" in out


def test_a_plan_that_does_not_fit_ends_with_1_and_says_what_would(
    request_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", "adapter=null", "--set", "compute.gpu=L4"]
    assert application.run(["plan", str(request_file), "--offline", *changes]) == 1
    out = capsys.readouterr().out
    assert out.startswith("Does not fit: ")
    assert "smallest changes that fit:" in out
    assert "adapter: {lora: {rank: 16}}" in out


def test_explain_shows_the_formula_of_every_figure(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    application.run(["plan", str(request_file), "--offline", "--explain"])
    out = capsys.readouterr().out
    assert "P × 2 B / 1, P = 7,248,023,552" in out


@pytest.mark.parametrize("both", [True, False])
def test_a_plan_is_asked_of_a_file_or_a_job(request_file: Path, capsys: pytest.CaptureFixture[str], both: bool) -> None:
    words = [str(request_file), "--compare", "demo"] if both else []
    assert application.run(["plan", *words]) == 2
    assert "One of FILE and --compare JOB is needed" in capsys.readouterr().err


def test_plan_as_json_has_the_documented_keys(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert application.run(["plan", str(request_file), "--offline", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"plan", "spec", "runs_here", "why_not_here", "not_served_yet", "findings"}
    assert answer["plan"]["parameters"] == 7_248_023_552
    assert all(isinstance(item["size_bytes"], int) for item in answer["plan"]["memory"])
    assert answer["spec"]["training"]["learning_rate"] == 2e-4


def test_what_cannot_be_looked_at_here_is_said_and_stands_against_nothing(
    request_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HONE_TRAINER_PYTHON", "/usr/bin/false")
    assert application.run(["plan", str(request_file)]) == 0
    out = capsys.readouterr().out
    assert "trainer  not checked  Model and data are looked at when it runs, first thing: The trainer in" in out
    assert "Next: " in out


def test_a_store_that_takes_nothing_stands_against_a_plan_that_fits(
    request_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HONE_TRAINER_PYTHON", "/usr/bin/false")
    monkeypatch.setenv("HONE_STORE", f"file://{tmp_path}/file/below")
    assert application.run(["plan", str(request_file), "--json"]) == 1
    [store, trainer] = json.loads(capsys.readouterr().out)["findings"]
    assert (store["check"], store["state"]) == ("store", "FAILED")
    assert (trainer["check"], trainer["state"]) == ("trainer", "NOT_CHECKED")


def test_every_problem_of_a_file_is_told_at_once(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--set", "training.learnig_rate=1", "--set", "adapter.lora.rank=0"]
    assert application.run(["plan", str(request_file), *overrides]) == 2
    text = capsys.readouterr()
    assert text.out == ""
    assert "tiny.yaml cannot run: 2 problems, nothing was started." in text.err
    assert "training.learnig_rate  unknown field. Did you mean learning_rate?" in text.err
    assert "adapter.lora.rank      0 is too small: rank is at least 1. Usual: 8 to 64." in text.err


def test_a_failure_under_json_is_an_object_on_stdout(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert application.run(["plan", str(request_file), "--json", "--set", "adapter.lora.rank=0"]) == 2
    text = capsys.readouterr()
    assert text.err == ""
    error = json.loads(text.out)["error"]
    assert error["reason"] == "INVALID_FIELDS"
    assert error["exit_code"] == 2
    assert [(one["path"], one["value"]) for one in error["violations"]] == [("adapter.lora.rank", 0)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pln"], "No such command 'pln'. Did you mean 'plan'?"),
        (["run"], "Missing argument 'FILE'"),
        (["plan", "x.yaml", "--explian"], "No such option: --explian"),
        (["list", "--limit", "0"], "--limit"),
        (["prune", "--older-than", "soon"], "'soon' is not an age: write 90m, 12h or 30d."),
        (["plan", "absent.yaml"], "absent.yaml: no such file."),
    ],
)
def test_wrong_usage_ends_with_2_and_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert application.run(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_wrong_usage_under_json_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert application.run(["plan", "--json", "--no-such"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "USAGE"


def test_an_input_of_the_examples_names_the_command_that_makes_it(
    request_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "model.source=file:///nowhere/examples/base/stdlib-4m"
    assert application.run(["plan", str(request_file), "--set", source]) == 2
    assert "python examples/make_base.py" in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_is_one_sentence_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HONE_HOME", str(tmp_path))
    assert tell(ZeroDivisionError("division by zero"), command="hone plan", as_json=False) == 1
    text = capsys.readouterr().err
    assert text.startswith("hone plan met an error that nobody foresaw: ZeroDivisionError: division by zero")
    assert "Traceback" not in text
    path = Path(text.strip().rpartition(" ")[2])
    assert path.parent == tmp_path
    assert "ZeroDivisionError" in path.read_text(encoding="utf-8")


def test_a_setting_that_cannot_be_read_is_named(
    request_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HONE_GRACE_S", "soon")
    assert application.run(["plan", str(request_file)]) == 2
    assert "HONE_GRACE_S  'soon': " in capsys.readouterr().err


def test_spec_shows_default_unit_and_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert application.run(["spec", "training.warmup_ratio"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "training.warmup_ratio  number, share of steps, ≥ 0, < 1",
        "    Share of the steps in which the learning rate rises; not together with warmup_steps. Default: 0.03, "
        "unless warmup_steps is set.",
    ]


def test_spec_of_an_unknown_field_is_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert application.run(["spec", "trainning"]) == 3
    assert "Did you mean training?" in capsys.readouterr().err


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    program = "import sys, hone.cli.app; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"grpc", "sqlalchemy", "boto3", "pydantic", "yaml", "torch", "google"} & set(loaded)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (quantities.size(0), "0 B"),
        (quantities.size(1024**2 * 2.44), "2.4 MiB"),
        (quantities.size(1024**3 * 116.2), "116 GiB"),
        (quantities.sizes([("weights", 4 * 1024**3), ("logits", 1024**3)]), "weights 4.0 · logits 1.0 GiB"),
        (quantities.duration(0.42), "0.4 s"),
        (quantities.duration(131), "2 min 11 s"),
        (quantities.duration(3600), "1 h"),
        (quantities.duration(6720), "1 h 52 min"),
        (quantities.clock(65), "1:05"),
        (quantities.clock(7389), "2:03:09"),
        (quantities.rate(2e-4), "2e-4"),
        (quantities.rate(1.43e-5), "1.4e-5"),
        (quantities.rate(0), "0"),
        (quantities.share(13_631_488, 7_248_023_552), "0.19 %"),
        (quantities.share(58, 100), "58 %"),
        (quantities.spark([8, 4, 2, 1]), "█▄▂▁"),
        (quantities.spark([1, 1]), ""),
        (quantities.loss(2.8126), "2.813"),
    ],
)
def test_quantities_read_well(text: str, expected: str) -> None:
    assert text == expected


def _event(
    type_: EventType, /, *, step: int | None = None, attempt: int = 1, message: str = "", **values: object
) -> Event:
    metrics = {name: value for name, value in values.items() if isinstance(value, float)}
    fields = {name: value for name, value in values.items() if isinstance(value, str)}
    return Event(
        seq=1, time=NOW, type=type_, attempt=attempt, step=step, metrics=metrics, fields=fields, message=message
    )


def _pairs_measured(*, margin: float) -> Event:
    figures = {"eval_loss": 0.6, "eval_rewards/margins": margin, "eval_rewards/accuracies": 0.875}
    return _event(EventType.EVAL, step=20, **figures)


def test_of_pairs_the_share_in_the_right_order_is_kept_and_shown_at_each_step() -> None:
    story = Story()
    story.add(_event(EventType.PROGRESS, step=1, loss=0.6, **{"rewards/accuracies": 0.75}))
    story.add(_pairs_measured(margin=0.2))
    assert story.eval_accuracy == 0.875
    assert story.progress() == "step 1 · loss 0.6 · 75% of pairs right"


def test_a_story_keeps_what_the_last_words_need() -> None:
    story = Story()
    for event in (
        _event(EventType.STATE, state="RUNNING"),
        _event(EventType.EVAL, step=0, eval_loss=4.7),
        _event(EventType.SAMPLE, when="before", prompt="p", answer="old", expected="e"),
        _event(EventType.PROGRESS, step=1, loss=4.9, max_steps=2.0),
        _event(EventType.PROGRESS, step=2, loss=2.8, learning_rate=2e-4, tokens_per_second=6120.0, eta_s=65.0),
        _event(EventType.EVAL, step=2, eval_loss=2.9),
        _event(EventType.SAMPLE, when="after", prompt="p", answer="new"),
    ):
        story.add(event)
    assert (story.losses, story.eval_losses) == ([4.9, 2.8], [4.7, 2.9])
    assert story.samples["p"].answers == {"before": "old", "after": "new"}
    assert story.samples["p"].expected == "e"
    assert story.progress() == "step 2/2 · loss 2.8 · lr 2e-4 · 6,120 tok/s · 1:05 left"


def test_a_second_attempt_begins_the_story_anew() -> None:
    story = Story()
    story.add(_event(EventType.PROGRESS, step=7, loss=4.9))
    story.add(_event(EventType.PROGRESS, step=1, loss=5.0, attempt=2))
    assert (story.step, story.losses) == (1, [5.0])


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (_event(EventType.STATE, state="QUEUED", message="3 ahead"), ("queued", "3 ahead")),
        (_event(EventType.PHASE, phase="model", message="model"), ("model", "loading the model")),
        (_event(EventType.EVAL, step=20, eval_loss=2.95), ("evaluation", "eval loss 2.95 at step 20")),
        (
            _pairs_measured(margin=0.2),
            ("evaluation", "eval loss 0.6, 87.5% of the pairs in the right order at step 20"),
        ),
        (_pairs_measured(margin=0.0), ("evaluation", "eval loss 0.6 at step 20")),
        (_event(EventType.OUTPUT, kind="adapter", size_bytes="2048"), ("output", "adapter is complete, 2.0 KiB")),
        (_event(EventType.CHECKPOINT, step=1200, size_bytes="2048"), ("checkpoint", "step 1,200 is stored, 2.0 KiB")),
        (_event(EventType.WARNING, message="slow"), ("warning", "slow")),
        (_event(EventType.PROGRESS, step=1), None),
        (_event(EventType.SAMPLE, prompt="p"), None),
        (
            Event(seq=1, time=NOW, type="of a later version", message="text"),
            ("of a later version", "text"),
        ),
    ],
)
def test_an_event_is_told_in_a_word_and_a_sentence(event: Event, line: tuple[str, str] | None) -> None:
    assert told(event) == line


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_show_progress_every_few_seconds_and_are_never_silent_for_longer() -> None:
    out, clock, story = io.StringIO(), _Clock(), Story()
    display = LineDisplay(Console(file=out, width=200), clock=clock)
    longest, last, lines = 0.0, 0.0, 0
    for tick in range(240):  # a minute of steps, then a minute of nothing
        clock.now = tick / 2
        if tick < 120:
            event = _event(EventType.PROGRESS, step=tick + 1, loss=1.0)
            story.add(event)
            display.show(event, story)
        else:
            display.wait(story)
        if out.getvalue().count("\n") > lines:
            longest, last, lines = max(longest, clock.now - last), clock.now, out.getvalue().count("\n")
    assert longest <= LINE_S
    assert lines <= 120 / LINE_S + 1


def test_a_paused_job_gives_no_signs_of_life() -> None:
    out, clock, story = io.StringIO(), _Clock(), Story()
    display = LineDisplay(Console(file=out, width=200), clock=clock)
    story.add(_event(EventType.STATE, state="PAUSED"))
    clock.now = 10 * LINE_S
    display.wait(story)
    assert out.getvalue() == ""
    story.add(_event(EventType.STATE, state="PENDING"))
    display.wait(story)
    assert "pending" in out.getvalue()


def _attempt(runs: Path, name: str, *, ended: float | None) -> Path:
    directory = runs / "default" / name / "attempt-1"
    (directory / "scratch").mkdir(parents=True)
    (directory / "scratch" / "data").write_bytes(b"x" * 1000)
    if ended is not None:
        exit_file = directory / "exit.json"
        exit_file.write_text("{}", encoding="ascii")
        os.utime(exit_file, (ended, ended))
    return directory


def test_prune_finds_ended_runs_only(tmp_path: Path) -> None:
    now = 10_000_000.0
    _attempt(tmp_path, "old", ended=now - 40 * 86400)
    _attempt(tmp_path, "young", ended=now - 3600)
    _attempt(tmp_path, "alive", ended=None)
    os.utime(tmp_path / "default" / "alive" / "attempt-1", (now, now))
    found = {
        leftover.path.relative_to(tmp_path).as_posix(): leftover.what
        for leftover in prune.find(tmp_path, now=now, older_than_s=30 * 86400)
    }
    assert found == {"default/old/attempt-1": "run", "default/young/attempt-1/scratch": "working files"}


def test_prune_removes_what_it_shows_and_asks_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HONE_HOME", str(tmp_path))
    attempt = _attempt(tmp_path / "runs", "old", ended=1.0)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert application.run(["prune"]) == 2  # nobody to ask
    assert application.run(["prune", "--dry-run", "--yes"]) == 0
    assert attempt.exists()
    capsys.readouterr()
    assert application.run(["prune", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_bytes"] == 1002
    assert list((tmp_path / "runs").iterdir()) == []
