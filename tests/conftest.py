"""What tests of the core share: requests that this machine can plan, and a trainer that takes no seconds."""

import json
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hone.spec import JobSpec
from hone.spec.parse import parse

from .integration.postgres import PostgresServer, find_postgres, run_postgres

GOLDEN = Path(__file__).parent / "golden"
QUICK_TRAINER = Path(__file__).parent / "integration" / "quick_trainer.py"
_TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden again instead of comparing")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests that must not run side by side do when pytest-xdist does not mark their groups: it said nothing, and hours
    went by."""
    if getattr(session.config.option, "loadgroup", False):
        for item in session.items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
                raise pytest.UsageError(f"pytest-xdist does not keep the group of {item.nodeid} together")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with a file below tests/golden, or writes it there with --update-golden."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: pytest --update-golden writes it; read it before you commit it"
        assert text == path.read_text(encoding="utf-8"), f"not as {path} has it; --update-golden writes it again"

    return compare


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A directory with `model` (a shape, and weights that nobody reads) and `rows.jsonl`."""
    place = tmp_path / "inputs"
    (place / "model").mkdir(parents=True)
    (place / "model" / "config.json").write_text(json.dumps(_TINY_LLAMA))
    (place / "model" / "model.safetensors").write_bytes(b"weights")
    (place / "rows.jsonl").write_text('{"text": "one row"}\n')
    return place


@pytest.fixture
def make_spec(inputs: Path) -> Callable[..., JobSpec]:
    """A request on those inputs; keywords replace its fields."""

    def make(**changes: Any) -> JobSpec:
        data = {
            "name": "demo",
            "model": {"source": f"file://{inputs / 'model'}"},
            "dataset": {"source": f"file://{inputs / 'rows.jsonl'}"},
            "method": {"sft": {}},
            "adapter": {"lora": {}},
            "compute": {"gpus_per_node": 0},
            **changes,
        }
        return parse(data)

    return make


@pytest.fixture
def quick_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HONE_TRAINER_PYTHON that runs the real trainer with a method that trains nothing."""
    script = tmp_path / "quick-python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{QUICK_TRAINER}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("HONE_TEST_STARTS", str(tmp_path / "starts"))
    return script


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL for the whole session; its tests are skipped where it is not installed."""
    programs = find_postgres()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: `make servers` says how (Debian's package is postgresql)")
    with run_postgres(programs) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    """A new, empty database."""
    return postgres.make_database(f"test_{uuid.uuid4().hex[:12]}")
