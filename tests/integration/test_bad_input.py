"""Bad requests and environments as a person meets them: `hone` in its own process, one message, the right exit code.

The table of bad fields is tests/unit/test_parse.py; here is what needs a real file, a real store, a real port. Nothing
may be recorded, and nothing half-made may be left behind.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..trainer.conftest import make_model, reversals, write_rows
from .servers import S3Server

HONE = str(Path(sys.executable).with_name("hone"))


@dataclass
class Machine:
    """A home, a model, a data set and a request that works; cases break one thing of it."""

    path: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.path / "home"

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def rows(self) -> Path:
        return self.path / "rows.jsonl"

    def request(self, changes: Mapping[str, Any]) -> Path:
        request: dict[str, Any] = {
            "name": "case",
            "model": {"source": f"file://{self.base}"},
            "dataset": {"source": f"file://{self.rows}"},
            "method": {"sft": {"max_length": 64}},
            "adapter": {"lora": {"rank": 2}},
            "training": {"max_steps": 2, "global_batch_size": 4},
        }
        file = self.path / "case.yaml"
        file.write_text(yaml.safe_dump({**request, **changes}))
        return file

    def hone(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HONE_HOME": str(self.home), "NO_COLOR": "1", "COLUMNS": "400", **self.environment}
        return subprocess.run(
            [HONE, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    def jobs(self) -> list[dict[str, Any]]:
        answer = self.hone("list", "--json")
        assert answer.returncode == 0, answer.stderr
        return list(json.loads(answer.stdout)["jobs"])


@pytest.fixture
def machine(tmp_path: Path, base_model: Path) -> Machine:
    machine = Machine(tmp_path)
    os.symlink(base_model, machine.base)
    write_rows(machine.rows, reversals(32))
    return machine


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny")


def own_base(machine: Machine) -> Path:
    """A base that a case may break."""
    base = machine.base.resolve()
    machine.base.unlink()
    machine.base.mkdir()
    for file in base.iterdir():
        (machine.base / file.name).write_bytes(file.read_bytes())
    return machine.base


def change_config(machine: Machine, **changes: Any) -> None:
    config = own_base(machine) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def pickled(machine: Machine) -> None:
    base = own_base(machine)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


Break = Callable[[Machine], object]
"""Breaks one thing; a mapping that it returns is laid over the request."""

BEFORE: dict[str, tuple[Break, tuple[str, ...], int]] = {
    "missing data file": (lambda m: m.rows.unlink(), ("dataset.source", "rows.jsonl"), 2),
    "empty data file": (lambda m: m.rows.write_text(""), ("dataset.source", "is empty"), 2),
    "data of an unknown kind": (
        lambda m: {"dataset": {"source": f"file://{m.rows.rename(m.path / 'rows.xls')}"}},
        ("dataset.source", "jsonl"),
        2,
    ),
    "missing model": (lambda m: m.base.unlink(), ("model.source", "base"), 2),
    "unknown architecture": (lambda m: change_config(m, model_type="nonsuch"), ("model.source", "nonsuch", "llama"), 2),
    "broken config.json": (
        lambda m: (own_base(m) / "config.json").write_text("{"),
        ("model.source", "config.json"),
        2,
    ),
    "pickle weights": (pickled, ("model.source", "pytorch_model.bin", "safetensors"), 2),
    "no weights": (lambda m: (own_base(m) / "model.safetensors").unlink(), ("model.source", "safetensors"), 2),
    "target that matches nothing": (
        lambda m: {"adapter": {"lora": {"target_modules": ["q_projj"]}}},
        ("adapter.lora.target_modules", "q_projj", "Did you mean q_proj?"),
        2,
    ),
    "a model that is not in the table": (
        lambda m: {"model": {"source": "hf://nobody/nothing"}},
        ("model.source", "nobody/nothing"),
        2,
    ),
    "GPUs that are not there": (
        lambda m: {"compute": {"gpu": "H100-80GB", "gpus_per_node": 1}},
        ("H100-80GB", "this machine has no GPU"),
        2,
    ),
    "a field of a later version": (
        lambda m: {"quantization": "nf4", "compute": {"strategy": "zero3", "processes_per_node": 2}},
        ("strategy zero3", "not served"),
        2,
    ),
    "adapter that is none": (
        lambda m: {
            "adapter": None,
            "dataset": None,
            "training": {},
            "method": {"merge": {"adapters": [{"source": f"file://{m.base}"}]}},
        },
        ("method.merge.adapters.0.source", "holds no adapter"),
        2,
    ),
    "home that is a file": (lambda m: m.home.write_text("x"), ("home",), 5),
    "database that is none": (
        lambda m: (m.home.mkdir(), (m.home / "hone.db").write_text("no database " * 100)),
        ("hone.db",),
        5,
    ),
    "store that cannot be written": (
        lambda m: m.environment.update(HONE_STORE="file:///proc/hone"),
        ("/proc/hone",),
        5,
    ),
    "store of an unknown kind": (lambda m: m.environment.update(HONE_STORE="ftp://x/y"), ("ftp://x/y", "s3://"), 2),
    "S3 endpoint that does not answer": (
        lambda m: m.environment.update(
            HONE_STORE="s3://bucket/x",
            HONE_STORE_ENDPOINT="http://127.0.0.1:9",
            AWS_ACCESS_KEY_ID="k",
            AWS_SECRET_ACCESS_KEY="s",
        ),
        ("127.0.0.1:9",),
        5,
    ),
}


@pytest.mark.parametrize(("broken", "words", "code"), BEFORE.values(), ids=BEFORE.keys())
def test_what_can_be_told_beforehand_is_told_before_anything_starts(
    machine: Machine, broken: Break, words: tuple[str, ...], code: int
) -> None:
    changes = broken(machine)
    answer = machine.hone("run", str(machine.request(changes if isinstance(changes, Mapping) else {})))
    told = answer.stdout + answer.stderr
    assert answer.returncode == code, told
    assert all(word in told for word in words), told
    assert "Traceback" not in told
    assert "nobody foresaw" not in told
    if code == 2 and not machine.environment:
        assert machine.jobs() == []
    runs = machine.home / "runs"
    assert not (runs.is_dir() and list(runs.rglob("*")))


INSIDE: dict[str, tuple[Break, tuple[str, ...], str]] = {
    "a row that is no JSON": (
        lambda m: m.rows.write_text('{"text": "a"}\n{"te\n'),
        ("rows.jsonl", "2"),
        "DATA",
    ),
    "a row without text": (
        lambda m: write_rows(m.rows, [*reversals(4), {"prompt": "x", "completion": None}]),
        ("completion", "5"),
        "DATA",
    ),
    "no column to learn from": (
        lambda m: write_rows(m.rows, [{"question": "a", "answer": "b"}]),
        ("question", "prompt"),
        "DATA",
    ),
    "nothing left to learn": (
        lambda m: write_rows(m.rows, [{"prompt": "x" * 200, "completion": "y"}]),
        ("max_length",),
        "DATA",
    ),
    "code that comes with a model": (
        lambda m: change_config(m, auto_map={"AutoModelForCausalLM": "evil.Model"}),
        ("auto_map",),
        "USER",
    ),
    "a chat template that does not mark the answers": (
        lambda m: (
            write_rows(
                m.rows, [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
            ),
            {
                "model": {
                    "source": f"file://{m.base}",
                    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
                }
            },
        )[1],
        ("generation",),
        "USER",
    ),
}


FIRST = ("a row that is no JSON", "code that comes with a model")
"""The others are the same way through other sentences, which tests of the trainer hold."""


@pytest.mark.parametrize(
    ("broken", "words", "failure_class"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name not in FIRST)) for name, case in INSIDE.items()],
)
def test_what_only_reading_tells_fails_the_run_with_its_class_before_a_step(
    machine: Machine, broken: Break, words: tuple[str, ...], failure_class: str
) -> None:
    changes = broken(machine)
    answer = machine.hone("run", str(machine.request(changes if isinstance(changes, Mapping) else {})))
    told = answer.stdout + answer.stderr
    assert answer.returncode == 1, told
    assert all(word in told for word in words), told
    assert "Traceback" not in told
    (job,) = machine.jobs()
    assert job["failure"]["failure_class"] == failure_class
    assert job["state"] == "FAILED"
    assert job["outputs"] == []
    assert not list((machine.home / "artifacts").rglob("MANIFEST.json"))


@pytest.fixture
def s3_machine(machine: Machine, s3_server: S3Server, bucket: Path) -> Machine:
    machine.environment = {
        "HONE_STORE": f"s3://{bucket.name}/outputs",
        "HONE_STORE_ENDPOINT": s3_server.endpoint,
        "AWS_ACCESS_KEY_ID": s3_server.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_server.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return machine


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, ("secret",)),
        ({"HONE_STORE": "s3://no-such-bucket/x"}, ("no-such-bucket",)),
    ],
    ids=["wrong credentials", "missing bucket"],
)
def test_a_store_that_refuses_is_told_before_anything_starts(
    s3_machine: Machine, changes: dict[str, str], words: tuple[str, ...]
) -> None:
    s3_machine.environment |= changes
    answer = s3_machine.hone("run", str(s3_machine.request({})))
    told = answer.stdout + answer.stderr
    assert answer.returncode == 5, told
    assert all(word in told for word in words), told
    assert not list((s3_machine.home / "runs").rglob("*"))


def test_outputs_reach_a_real_s3_store(s3_machine: Machine) -> None:
    answer = s3_machine.hone("run", str(s3_machine.request({})))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    downloaded = s3_machine.path / "downloaded"
    fetched = s3_machine.hone("download", "case", str(downloaded))
    assert fetched.returncode == 0, fetched.stdout + fetched.stderr
    assert list(downloaded.rglob("adapter_model.safetensors"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_port_that_is_taken_is_one_sentence(machine: Machine, taken_port: int) -> None:
    answer = machine.hone("serve", "--address", f"127.0.0.1:{taken_port}")
    assert answer.returncode == 5, answer.stderr
    assert str(taken_port) in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_service_without_tls_refuses_to_listen_for_others(machine: Machine) -> None:
    answer = machine.hone("serve", "--address", "0.0.0.0:7465")
    assert answer.returncode == 2, answer.stderr
    assert "0.0.0.0:7465" in answer.stderr
