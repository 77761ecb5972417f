"""What `hone try` compares: one base and what jobs left on it, brought to this machine. `python -m hone_trainer answer`
starts here.

The first line on stdin says what is wanted (`Wanted`, as JSON). Refuses jobs of different bases. Imports no torch: when
everything is there the process becomes answering.py, offline and without secrets, which says more of the lines.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hone.modelinfo import read_adapter_directory
from hone.run import TrainerExit
from hone_trainer.failure import RunFailed, classify, failure_of, failure_to_json
from hone_trainer.inputs import Source, fetch_model
from hone_trainer.launch import offline
from hone_trainer.process import die_with_parent

_LIBRARIES = ("torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What one job left."""

    name: str
    kind: str
    """adapter, merged or model."""
    asked: str
    """For messages: `job://<id>/<kind>`."""
    path: str
    """Where it lies on this machine; its files were held against its manifest."""
    base: str = ""
    """Source of the model that the job started from. An adapter knows its base better than that."""
    plain: bool = False
    """Whether it gets prompts as they are, whatever chat template its tokenizer has."""

    @property
    def source(self) -> Source:
        """The same as an input."""
        return Source(asked=self.asked, path=self.path)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Who is to answer."""

    jobs: tuple[Candidate, ...]
    scratch: str
    """A directory for what is fetched; whoever starts this process made it and removes it."""
    asks_base: bool = True
    plain_base: bool = False
    base: Source | None = None
    """Filled in here; None where nobody needs it."""

    @staticmethod
    def from_json(text: str | bytes) -> "Wanted":
        """Read what `to_json`, or `hone try`, wrote."""
        data = json.loads(text)
        base = Source(**found) if (found := data.pop("base", None)) else None
        return Wanted(jobs=tuple(Candidate(**job) for job in data.pop("jobs")), base=base, **data)

    def to_json(self) -> str:
        """For answering.py."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class _Base:
    """The base of one job, as far as it is known without reading it."""

    job: str
    address: str
    """Where it is fetched from."""
    source: str
    revision: str = ""
    hashes: tuple[str, ...] = ()
    """Of its configuration and its weights; empty where nobody wrote them down."""

    def is_same(self, other: "_Base") -> bool:
        """By its hashes, as a base may have moved; by its source where there are none."""
        if self.hashes and other.hashes:
            return self.hashes == other.hashes
        return self.source == other.source

    def named(self, *, exactly: bool) -> str:
        """For messages; `exactly` where the source alone does not tell it from another."""
        told = f"{self.source}{f' at {self.revision}' if self.revision else ''}"
        return f"{told} (weights {self.hashes[-1][:12]})" if exactly and self.hashes else told


def main() -> int:
    """Gather what is wanted and go on as answering.py; the answer is an exit code, where that was not to be."""
    die_with_parent()
    try:
        _check_libraries()
        wanted = gather(Wanted.from_json(sys.stdin.buffer.readline()))
        file = Path(wanted.scratch) / "wanted.json"
        file.write_text(wanted.to_json(), encoding="utf-8")
    except Exception as error:
        failed = classify(error)
        say({"failure": failure_to_json(failure_of(failed))})
        return int(failed.code)
    # A process of its own: the Hub's library decides on being offline when it is imported, and may have fetched here.
    os.execve(sys.executable, [sys.executable, "-m", "hone_trainer.answering", str(file)], offline(os.environ))


def say(message: Mapping[str, Any]) -> None:
    """One line on stdout."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def gather(wanted: Wanted) -> Wanted:
    """The same with its base on this machine. Raises RunFailed (USER) where the jobs do not share one."""
    base = _common_base(wanted.jobs)
    if not (wanted.asks_base or any(job.kind == "adapter" for job in wanted.jobs)):
        return wanted
    found = fetch_model(f"the base of {base.job}", base.address, Path(wanted.scratch) / "base")
    return Wanted(**{**vars(wanted), "base": found})


def _common_base(jobs: tuple[Candidate, ...]) -> _Base:
    first, *others = (_base_of(job) for job in jobs)
    for other in others:
        if not first.is_same(other):
            exactly = first.named(exactly=False) == other.named(exactly=False)
            raise RunFailed(
                TrainerExit.USER,
                f"{first.job} was trained on {first.named(exactly=exactly)} and {other.job} on "
                f"{other.named(exactly=exactly)}: what is tried together shares one base.",
                fix="Try them one after the other.",
            )
    return next((base for base in (first, *others) if base.hashes), first)  # its address names a revision


def _base_of(job: Candidate) -> _Base:
    adapter = read_adapter_directory(Path(job.path), job.asked)
    if adapter is None:
        return _Base(job.name, job.base, job.base)
    hashes = tuple(str(adapter.identity.get(name) or "") for name in ("config_sha256", "weights_sha256"))
    source, revision = (str(adapter.identity.get(name) or "") for name in ("source", "revision"))
    return _Base(job.name, adapter.base, source or adapter.base, revision, hashes if all(hashes) else ())


def _check_libraries() -> None:
    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        raise RunFailed(
            TrainerExit.USER,
            f"{sys.executable} lacks {', '.join(missing)}, so nothing can be loaded to answer.",
            fix=f"Install the extra [trainer] of hone-tuning for {sys.executable}.",
        )
