"""Whose adapter is loaded on what: everything that PEFT would take without a word."""

import shutil
from pathlib import Path

import pytest

from hone_trainer.base_identity import base_identity, public_name
from hone_trainer.inputs import Source


def test_a_base_is_known_by_source_revision_and_config(tiny_model: Path) -> None:
    identity = base_identity(Source(asked="hf://org/name@main", path=str(tiny_model), revision="abc"))
    assert (identity["source"], identity["revision"], len(identity["config_sha256"])) == (
        "hf://org/name@main",
        "abc",
        64,
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("hf://org/name@v1", "org/name"),
        ("file:///home/me/secret/base", "base"),
        ("s3://bucket/base", "s3://bucket/base"),
    ],
)
def test_a_base_is_named_without_paths_of_this_machine(asked: str, expected: str) -> None:
    assert public_name(Source(asked=asked, path="/cache")) == expected


def test_weights_that_a_repository_holds_twice_count_once(tiny_model: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(tiny_model, tmp_path / "both"))
    shutil.copy(both / "model.safetensors", both / "consolidated.safetensors")
    once, twice = (base_identity(Source(asked="hf://org/name", path=str(path))) for path in (tiny_model, both))
    assert once == twice
