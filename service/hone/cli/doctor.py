"""`hone doctor`: what this machine has, and what is missing for which method.

Looks for itself: imports the trainer's libraries in the Python that would run them, asks the driver, writes and reads
back a few bytes in the store.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from hone import quantities as q
from hone.cli.answer import print_json
from hone.cli.console import answers, remarks
from hone.cli.environment import read_settings
from hone.cli.failure import ExitCode
from hone.cli.options import AsJson

if TYPE_CHECKING:
    from hone.settings import Settings

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")
"""What every method needs."""
EXTRAS = {"QLoRA (nf4)": ("bitsandbytes",), "zero2, zero3": ("deepspeed",)}
"""What more some choices need."""
LEAST_FREE_BYTES = 2 * 1024**3
"""Below this a small run has no room for its scratch files and outputs."""
IMPORT_TIMEOUT_S = 120

_PROBE = """
import importlib, importlib.metadata, json
found = {}
for name in %r:
    try:
        importlib.import_module(name)
        found[name] = importlib.metadata.version(name)
    except Exception as error:
        found[name] = "!" + type(error).__name__ + ": " + str(error).split("\\n")[0]
for name in %r:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = "!not installed"
try:
    import torch
    found["cuda"] = str(torch.cuda.device_count())
except ImportError:
    found["cuda"] = "0"
print(json.dumps(found))
"""
"""Run by the trainer's Python: library → version, or `!` and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    text: str
    fix: str = ""


def doctor(as_json: AsJson = False) -> int:
    """Look at this machine: what it has, and what is missing for which method.

    Ends with 0 when supervised fine-tuning runs here, and 1 when something is missing.
    """
    settings = read_settings()
    with remarks().status("importing the trainer's libraries …"):
        libraries = _libraries(settings)
    checks = list(_checks(settings, libraries))
    methods = _methods(libraries)
    ready = all(check.ok for check in checks)
    if as_json:
        print_json({"ready": ready, "checks": [asdict(check) for check in checks], "methods": methods})
    else:
        _print(checks, methods, ready=ready)
    return ExitCode.DONE if ready else ExitCode.FAILED


def _checks(settings: "Settings", libraries: Mapping[str, str]) -> Iterator[Check]:
    yield _machine()
    yield _gpus(libraries)
    yield _trainer(settings, libraries)
    yield _home(settings.home)
    yield _store(settings)
    yield _service(settings)


def _machine() -> Check:
    import psutil

    from hone.machine import usable_cores

    memory = psutil.virtual_memory()
    text = (
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {usable_cores()} cores, "
        f"{q.size(memory.total)} of memory, {q.size(memory.available)} free"
    )
    known = platform.system() == "Linux" and platform.machine() == "x86_64"
    return Check(name="machine", ok=known, text=text, fix="" if known else "Hone is tested on Linux x86-64 only.")


def _gpus(libraries: Mapping[str, str]) -> Check:
    from hone.machine import installed_gpus

    gpus = installed_gpus()
    if not gpus:
        return Check(name="GPUs", ok=True, text="none; runs train on the CPU")
    text = ", ".join(f"{name} {q.size(memory)}" for name, memory, _ in gpus)
    seen = int(libraries.get("cuda", "0"))
    fix = "" if seen == len(gpus) else f"torch sees {seen} of them: install a torch build that fits the driver."
    return Check(name="GPUs", ok=not fix, text=text, fix=fix)


def _trainer(settings: "Settings", libraries: Mapping[str, str]) -> Check:
    broken = {name: libraries[name].removeprefix("!") for name in LIBRARIES if libraries[name].startswith("!")}
    python = settings.trainer_python or sys.executable
    if broken:
        text = "; ".join(f"{name}: {why}" for name, why in broken.items())
        return Check(
            name="trainer", ok=False, text=text, fix=f"Install the extra [trainer] of hone-tuning for {python}."
        )
    return Check(name="trainer", ok=True, text=", ".join(f"{name} {libraries[name]}" for name in LIBRARIES))


def _home(home: Path) -> Check:
    there = next(path for path in (home, *home.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK) or not there.is_dir():
        return Check(
            name="home",
            ok=False,
            text=f"{home}: {there} cannot be written",
            fix="Set HONE_HOME to a directory of yours.",
        )
    free = shutil.disk_usage(there).free
    text = f"{home}{'' if home.exists() else ' (made by the first run)'}, {q.size(free)} of disk free"
    fix = (
        "" if free >= LEAST_FREE_BYTES else f"Less than {q.size(LEAST_FREE_BYTES)} free: `hone prune` removes old runs."
    )
    return Check(name="home", ok=not fix, text=text, fix=fix)


def _store(settings: "Settings") -> Check:
    from hone.cli.preflight import store_finding
    from hone.findings import FindingState

    found = store_finding(settings)
    is_ok = found.state == FindingState.OK
    text = found.message if is_ok else f"{settings.store_uri}: {found.message}"
    return Check(name="store", ok=is_ok, text=text, fix=found.fix)


def _service(settings: "Settings") -> Check:
    if settings.server:
        return Check(name="service", ok=True, text=f"{settings.server} (HONE_SERVER)")
    from hone.home import owner

    found = owner(settings.home)
    if found is None:
        return Check(name="service", ok=True, text="no `hone serve` runs; commands start one for themselves")
    return Check(name="service", ok=True, text=f"process {found.pid} serves at {found.address}")


def _libraries(settings: "Settings") -> dict[str, str]:
    extras = [name for names in EXTRAS.values() for name in names]
    program = _PROBE % (LIBRARIES, extras)
    python = settings.trainer_python or sys.executable
    try:
        answer = subprocess.run(
            [python, "-W", "ignore", "-c", program],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            check=True,
        )
        found: dict[str, str] = json.loads(answer.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return dict.fromkeys([*LIBRARIES, *extras], f"!{python} does not run: {error}") | {"cuda": "0"}
    return found


def _methods(libraries: Mapping[str, str]) -> dict[str, str]:
    """Method or choice → ready, or what is missing."""
    from hone.spec.combinations import UNSERVED
    from hone.spec.methods import METHODS

    later = {value for rule in UNSERVED if len(rule.when) == 1 for value in rule.when.values()}
    names = {**dict.fromkeys(METHODS, LIBRARIES), **{name: (*LIBRARIES, *more) for name, more in EXTRAS.items()}}
    words = {"QLoRA (nf4)": "nf4", "zero2, zero3": "zero3"}
    return {
        name: _readiness(needed, libraries, served=words.get(name, name) not in later) for name, needed in names.items()
    }


def _readiness(needed: tuple[str, ...], libraries: Mapping[str, str], *, served: bool) -> str:
    missing = [name for name in needed if libraries[name].startswith("!")]
    if missing:
        return f"needs {', '.join(missing)}"
    return "ready" if served else "not served by this version; its libraries are here"


def _print(checks: list[Check], methods: Mapping[str, str], *, ready: bool) -> None:
    console = answers()
    faulty = [check.name for check in checks if not check.ok]
    console.print("Ready: requests of method sft run here." if ready else f"Not ready: see {', '.join(faulty)}.")
    console.print()
    table = Table.grid(padding=(0, 2))
    for check in checks:
        table.add_row("", check.name, " ".join(part for part in (check.text, check.fix) if part))
    console.print(table)
    console.print()
    table = Table.grid(padding=(0, 2))
    for name, text in methods.items():
        table.add_row("", name, text)
    console.print(table)
