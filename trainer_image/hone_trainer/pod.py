"""The trainer in a pod: `python -m hone_trainer pod`, the command of the container.

It makes a run directory of what the manifest gave it, runs the supervisor there as `python -m hone_trainer run` does,
and leaves what Kubernetes keeps: an exit code (TrainerExit) and a termination message. It is the container's first
process: it reaps orphans and passes signals on, and when the supervisor itself is killed it can still say so. It needs
one directory that can be written, works under any user id, and prints

    {"seq": 7, "time": …}       each event, so that what was never acknowledged can be read from the pod's log
    [rank 3] …                  each line of a rank's own log
    anything else               words of the supervisor and its launcher

Nothing but what the manifest names is contacted.
"""

import json
import os
import signal
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from hone.errors import HoneError
from hone.job import Failure
from hone.manifests import names
from hone.run import RunDirectory, TrainerExit
from hone.storage.local import os_errors_as_storage
from hone_trainer.failure import (
    RunFailed,
    classify,
    failure_from_json,
    failure_of,
    termination_message,
    write_atomically,
)
from hone_trainer.fit import Asked
from hone_trainer.node import Node
from hone_trainer.process import run_as_first
from hone_trainer.report import last_checkpoint, say
from hone_trainer.supervisor import Setting, supervise

_PLACES = {
    "HOME": "home",
    "TMPDIR": names.TEMPORARY_DIRECTORY,
    "HF_HOME": "huggingface",
    "XDG_CACHE_HOME": "cache",
    "TRITON_CACHE_DIR": "cache/triton",
    "TORCHINDUCTOR_CACHE_DIR": "cache/inductor",
    "MPLCONFIGDIR": "cache/matplotlib",
}
"""Where libraries write, below the scratch space."""
_USER = "hone"
"""A user id without a name has none for getpass either, which torch asks."""
_KILLED = 128


def main() -> int:
    """Run the attempt that the manifest describes; the answer is the container's exit code."""
    environment = os.environ
    try:
        directory = _make_directory(environment)
        setting = Setting(
            node=Node.of(environment),
            asked=Asked.of(environment),
            pod=environment.get(names.ENV_POD_UID, ""),
            prints_logs=True,
        )
    except HoneError as error:
        refused = classify(error)
        say(str(refused))
        _leave_message(environment, failure_of(refused))
        return int(refused.code)
    code = run_as_first(lambda: int(supervise(directory.path, setting)))
    if failure := _failure(directory, code):
        _leave_message(environment, failure, last_checkpoint(directory.events))
    return code if code >= 0 else _KILLED - code


def _make_directory(environment: MutableMapping[str, str]) -> RunDirectory:
    """The run directory, with the request as the manifest's file has it now; later edits of it change nothing."""
    work = Path(environment.get(names.ENV_WORK) or names.WORK_DIRECTORY)
    # The scratch volume may be one that outlives pods, or that several share.
    directory = RunDirectory(work / "pods" / (environment.get(names.ENV_POD_UID) or "pod"))
    with os_errors_as_storage(work):
        _make_places(environment, work)
        directory.trainer_log.parent.mkdir(parents=True, exist_ok=True)
    file = Path(environment.get(names.ENV_SPEC_FILE) or names.SPEC_FILE)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFailed(
            TrainerExit.USER,
            f"The request cannot be read from {file}: {error}.",
            fix=f"It comes from the annotation {names.ANNOTATION_SPEC} of the pod: render the manifest again.",
        ) from error
    if not directory.run_file.exists():  # a container that is started again in its pod meets its own lock
        write_atomically(directory.run_file, text)
    return directory


def _make_places(environment: MutableMapping[str, str], work: Path) -> None:
    """Directories for everything that writes, and a name for the user: the root is read-only, the user id any."""
    for name, place in _PLACES.items():
        path = Path(environment.get(name) or work / place)
        with suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            path = work / place
            path.mkdir(parents=True, exist_ok=True)
        environment[name] = str(path)
    for name in ("USER", "LOGNAME"):
        environment[name] = environment.get(name) or _USER


def _failure(directory: RunDirectory, code: int) -> Failure | None:
    """What the supervisor left; or what can be said of one that left nothing."""
    if code == TrainerExit.SUCCEEDED:
        return None
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        if code >= 0 and (told := json.loads(directory.exit.read_bytes())["failure"]):
            return failure_from_json(told)
    if code < 0:
        name = signal.Signals(-code).name
        error = RunFailed(
            TrainerExit.WORKER_DIED,
            f"The trainer's supervisor was killed by {name}.",
            fix="When nobody did that, its container ran out of memory: let the platform give its pods more.",
        )
        return failure_of(error)
    error = RunFailed(
        TrainerExit(code) if code in set(TrainerExit) else TrainerExit.INTERNAL,
        f"The trainer ended with code {code} and left no reason.",
        fix="Read the pod's log.",
    )
    return failure_of(error)


def _leave_message(
    environment: Mapping[str, str], failure: Failure, checkpoint: Mapping[str, object] | None = None
) -> None:
    """The termination message; without it Kubernetes takes the last lines of the log."""
    file = Path(environment.get("HONE_TERMINATION_FILE") or names.TERMINATION_MESSAGE_FILE)
    with suppress(OSError):
        file.write_bytes(termination_message(failure, checkpoint))
