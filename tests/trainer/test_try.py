"""`hone try` as people and scripts call it: on finished jobs whose outputs are real, if tiny."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..conftest import QUICK_TRAINER
from ..integration.terminal import HONE, Terminal
from .conftest import make_adapter, make_model

pytestmark = pytest.mark.xdist_group("try")
JOBS = ("first", "second", "elsewhere", "whole")


class World:
    """A HONE_HOME with finished jobs: two adapters of one base, one of another base, and a whole model."""

    def __init__(self, place: Path) -> None:
        import sys

        self.place = place
        base, other = make_model(place / "tiny"), make_model(place / "other", seed=1)
        outputs = place / "outputs"
        make_adapter(outputs / "first" / "adapter", base, seed=0)
        make_adapter(outputs / "second" / "adapter", base, seed=1)
        make_adapter(outputs / "elsewhere" / "adapter", other, seed=2)
        make_model(outputs / "whole" / "model", seed=3)
        (place / "rows.jsonl").write_text('{"text": "one row"}\n')
        python = place / "quick-python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{QUICK_TRAINER}" "$@"\n')
        python.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")}
        self.environment = kept | {"HONE_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
        self._running = self.environment | {
            "HONE_TRAINER_PYTHON": str(python),
            "HONE_TEST_STARTS": str(place / "starts"),
            "HONE_TEST_OUTPUTS": str(outputs),
        }
        for name in JOBS:
            self.request(name, **({"prompts": "text"} if name == "whole" else {}))
            done = self.hone("run", self.place / f"{name}.yaml", environment=self._running)
            assert done.returncode == 0, done
        self.ids = {name: self.hone("get", name, "--json").stdout for name in JOBS}
        self.ids = {name: json.loads(text)["id"] for name, text in self.ids.items()}

    def request(self, name: str, **labels: str) -> Path:
        path = self.place / f"{name}.yaml"
        data = {
            "name": name,
            "labels": labels,
            "model": {"source": f"file://{self.place / ('other' if name == 'elsewhere' else 'tiny')}"},
            "dataset": {"source": f"file://{self.place / 'rows.jsonl'}"},
            "method": {"sft": {}},
            "compute": {"gpus_per_node": 0},
            **({} if name == "whole" else {"adapter": {"lora": {}}}),
        }
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        return path

    def submit(self, name: str, **labels: str) -> None:
        done = self.hone("submit", self.request(name, **labels), environment=self._running)
        assert done.returncode == 0, done

    def hone(
        self, *arguments: object, stdin: str | None = None, environment: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [HONE, *map(str, arguments)],
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=environment or self.environment,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("try"))


def test_prompts_are_answered_by_the_base_and_every_job(world: World) -> None:
    first, second = world.ids["first"], world.ids["second"]
    options = ("--prompt", "ab = ", "--prompt", "-", "--max-new-tokens", 8, "--json")
    done = world.hone("try", "first", "second", "first", *options, stdin="from stdin\n")
    assert done.returncode == 0, done
    answer = json.loads(done.stdout)
    assert [model["name"] for model in answer["models"]] == ["base", first, second]
    assert [one["prompt"] for one in answer["prompts"]] == ["ab = ", "from stdin"]
    for one in answer["prompts"]:
        assert [given["model"] for given in one["answers"]] == ["base", first, second]
        assert len({given["text"] for given in one["answers"]}) == 3
        assert set(one["answers"][0]) == {"model", "text", "tokens", "ended_by", "seconds"}
    assert answer["notes"] == []


def test_answers_stand_side_by_side_without_the_base_where_it_is_not_wanted(world: World) -> None:
    done = world.hone("try", "first", "whole", "--no-base", "--prompt", "ab = ", "--max-new-tokens", 4)
    assert done.returncode == 0, done
    words = [line.split("  ")[0] or line.strip().split("  ")[0] for line in done.stdout.splitlines() if line.strip()]
    assert words[0] == "prompt"
    assert [name in done.stdout for name in ("base", *world.ids.values())] == [False, True, False, False, True]


@pytest.mark.parametrize(
    ("arguments", "chat"),
    [
        (["whole"], [False, False]),
        (["whole", "--chat"], [True, True]),
        (["first", "whole"], [True, True, False]),
        (["first", "whole", "--plain"], [False, False, False]),
    ],
)
def test_prompts_are_given_as_the_rows_were(world: World, arguments: list[str], chat: list[bool]) -> None:
    done = world.hone("try", *arguments, "--prompt", "ab", "--max-new-tokens", 1, "--json")
    assert done.returncode == 0, done
    assert [model["chat"] for model in json.loads(done.stdout)["models"]] == chat


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nobody", "--prompt", "x"], 3, "nobody"),
        (["first"], 2, "nobody can be asked here: give --prompt TEXT"),
        (["first", "--json"], 2, "--json answers prompts: give --prompt."),
        (["first", "--prompt", "x", "--seed", "1"], 2, "--seed needs --temperature"),
        (["first", "--prompt", "x", "--plain", "--system", "y"], 2, "--plain leaves no place for --system"),
        (["first", "--prompt", "-", "--prompt", "-"], 2, "can stand there once"),
        (
            ["whole", "--prompt", "x", "--system", "y"],
            2,
            "--system needs a chat template, and here every prompt is given",
        ),
        (["first", "elsewhere", "--prompt", "x"], 2, r"was trained on file://\S+/tiny and elsewhere-\w+ on file://\S+"),
    ],
)
def test_what_cannot_be_tried_is_told(world: World, arguments: list[str], code: int, sentence: str) -> None:
    done = world.hone("try", *arguments)
    assert (done.returncode, done.stdout.replace("\n", "") if "--json" not in arguments else "") == (code, ""), done
    assert re.search(sentence, done.stderr + done.stdout), done


def test_a_job_that_has_not_finished_or_was_cancelled_is_not_tried(world: World) -> None:
    world.submit("long", steps="3000", pause_ms="20")
    done = world.hone("try", "long", "--prompt", "x", "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["reason"]) == (2, "WRONG_STATE")
    assert re.search(
        r"Job long-\w+ is (QUEUED|RUNNING): it has no outputs yet\. See: hone watch long", error["message"]
    )
    world.hone("cancel", "long")
    done = world.hone("try", "long", "--prompt", "x")
    assert done.returncode == 2
    assert re.search(r"Job long-\w+ is CANCELLED: it left no outputs\.", done.stderr)


@pytest.mark.parametrize(
    ("spoil", "code", "sentence"),
    [
        (lambda path: shutil.rmtree(path), 3, "is not on this machine"),
        (lambda path: (path / "adapter_config.json").write_text("{}"), 1, "adapter_config.json"),
    ],
)
def test_outputs_that_are_gone_or_altered_are_not_loaded(
    world: World, tmp_path: Path, spoil: Callable[[Path], Any], code: int, sentence: str
) -> None:
    uri = json.loads(world.hone("get", "second", "--json").stdout)["outputs"][0]["uri"]
    place = Path(uri.removeprefix("file://"))
    shutil.copytree(place, tmp_path / "kept")
    spoil(place)
    try:
        done = world.hone("try", "second", "--prompt", "x")
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", place)
    assert done.returncode == code, done
    assert sentence in done.stderr


def test_a_conversation_on_a_terminal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HONE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")  # this terminal tells no positions
    monkeypatch.setenv("HONE_HOME", world.environment["HONE_HOME"])
    first, second = world.ids["first"], world.ids["second"]
    terminal = Terminal("try", "first", "second", "--max-new-tokens", "400")
    terminal.read_until(rf"base, {first}, {second} on \w+\. /help shows the commands")
    terminal.type("/models\r")
    terminal.read_until(rf"\*  {second} +adapter +chat template")
    terminal.type("/us\t")
    terminal.read_until(r"/use(\x1b\[C| )")  # a space, or a step to the right
    terminal.type("base fir\r")
    terminal.read_until(rf"base, {first} from here on")
    terminal.type("/use nobody\r")
    terminal.read_until("'nobody' is none of base")
    terminal.type("/system be brief\r")
    terminal.read_until("The system prompt is set")
    terminal.type("/nonsense\r")
    terminal.read_until("There is no /nonsense; there are /use")
    terminal.type("ab = \r")
    terminal.read_until(rf"(?s)Kbase .*K{first} .* …")
    terminal.type("/use second\r")
    terminal.read_until(f"{second} from here on")
    terminal.type("cd = \r")
    terminal.read_until(r"2004l.")  # the prompt is left, and the first token is there
    terminal.type("\x03")
    terminal.read_until(r"(?s) … \(stopped\).*2004h")
    terminal.type("half a line\x03")  # gives the line up
    terminal.read_until("(?s)2004l.*2004h")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    history = Path(world.environment["HONE_HOME"]) / "try-history"
    assert "+ab = \n" in history.read_text() and history.stat().st_mode & 0o777 == 0o600
