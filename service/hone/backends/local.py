"""This machine as a backend: every attempt is `python -m hone_trainer run <directory>` in a session of its own.

It survives the service: what it needs to know lies in the run directories `<home>/runs/<namespace>/<job>/attempt-<n>/`.
A trainer is never run twice, whoever is killed when: it takes the lock of its directory and refuses one that was used.
An attempt that was ended from outside (killed, or stopped by a signal) is final: on this machine somebody did that.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from hone.backends import run_files
from hone.backends.base import ForeignJob, Observation, Owner, Phase, Problem
from hone.backends.inputs import check_inputs, sources
from hone.backends.room import GIB, Needs, Room, Share
from hone.crash import crash_point
from hone.errors import InvalidRequest, NotServed, StorageError, Violation, WrongState
from hone.findings import Finding, FindingState, from_json
from hone.job import Event, Failure, FailureClass, Plan
from hone.plan import Hardware, Planned
from hone.run import ENV_PYTHON_REWARDS, Run, RunDirectory, TrainerExit
from hone.spec import JobSpec
from hone.spec.rewards import forbidden_functions
from hone.trainer_process import CannotAsk, TrainerProcess

_ENDED_ON_PURPOSE = frozenset(
    {TrainerExit.INTERRUPTED, TrainerExit.WORKER_DIED, TrainerExit.FENCED, TrainerExit.ALREADY_RAN}
)
PREFLIGHT_S = 300.0
"""The longest that a look at what a request names may take."""
_SHARE_FILE = "room.json"
_STOP_FILE = "stop.json"


class LocalBackend:
    """Starts, watches and stops trainers on this machine. Safe to use from several threads."""

    name = "local"
    max_waiting: int | None = 16
    poll_s = 0.5
    keeps_ended = True

    def __init__(
        self,
        runs: Path,
        *,
        hardware: Hardware,
        trainer_python: str = "",
        python_rewards: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment` is added to this process's own for the trainers."""
        self._python_rewards = python_rewards
        self._runs = runs
        self._python = trainer_python or sys.executable
        allowed = {ENV_PYTHON_REWARDS: "1" if python_rewards else ""}
        self._environment = {**os.environ, **allowed, **(environment or {})}
        self._trainer = TrainerProcess(trainer_python, self._environment)
        self._lock = threading.Lock()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._reader = run_files.EventReader()
        self._room = Room(
            memory_bytes=hardware.memory_bytes,
            cores=hardware.cpu_cores,
            gpus=_visible_gpus(len(hardware.installed), self._environment),
        )
        # What lies on the disk is looked at once a second, however many requests come; what is wrong, each time.
        self._check_inputs = lru_cache(maxsize=1024)(lambda inputs, second: check_inputs(inputs))
        self._free_bytes = lru_cache(maxsize=1)(self._look_at_disk)
        self._find_shares()

    def close(self) -> None:
        """Let go of the trainers; they run on, and the next service finds them."""
        self._trainer.close()
        for child in self._children.values():
            if child.poll() is None:
                child.returncode = 0  # it is nobody's child any more, and no mistake: keeps Popen from warning
        self._children.clear()

    @property
    def problems(self) -> Sequence[Problem]:
        """None: a machine that cannot be seen does not ask."""
        return ()

    def subscribe(self, callback: Callable[[str, str], None]) -> Callable[[], None]:
        """Nothing here tells of changes: they are looked for."""
        return lambda: None

    def check(self, planned: Planned, *, namespace: str) -> None:
        """Refuse what this machine cannot run: what only a cluster has, its hardware, its files, its disk."""
        _refuse_cluster_fields(planned.spec)
        if not self._python_rewards and (found := list(forbidden_functions(planned.spec))):
            raise InvalidRequest(found)
        if not planned.runs_here:
            fix = "Change compute, or send it to a service that has this."
            message = f"cannot run on this machine: {planned.why_not_here} {fix}"
            raise InvalidRequest([Violation(path="compute", message=message)])
        self._check_inputs(sources(planned.spec), int(time.monotonic()))
        self._check_disk(planned.plan)

    def preflight(self, run: Run, plan: Plan) -> Sequence[Finding]:
        """What the trainer's own look finds."""
        try:
            return from_json(self._trainer.ask("preflight", run.to_yaml(), timeout_s=PREFLIGHT_S)["findings"])
        except CannotAsk as error:
            return [Finding(check="trainer", state=FindingState.FAILED, message=error.message, fix=error.fix)]

    def manifest(self, planned: Planned, *, namespace: str) -> str:
        """None: there is no cluster."""
        return ""

    def ensure(self, run: Run, plan: Plan) -> Observation:
        """Start the trainer, where there is room and none was started."""
        with self._lock:
            seen = self._look(run)
            if seen.phase != Phase.ABSENT:
                return seen
            self._free_ended()
            share = self._room.held.get(_key(run)) or self._room.take(_key(run), run.job, Needs.of(plan))
            if isinstance(share, str):
                return Observation(phase=Phase.WAITING, reason=share)
            return self._start(run, share)

    def observe(self, run: Run, *, after_seq: int) -> Observation:
        """Look at the trainer and read its events on."""
        with self._lock:
            seen = self._look(run)
            # Read after the look: what an ended trainer wrote is all there.
            events = self._reader.read(self._directory(run).events, after_seq=after_seq)
            return replace(seen, events=events)

    def stop(self, run: Run, *, grace_s: float) -> Observation:
        """SIGTERM to the trainer; after the grace, SIGKILL to all of its session."""
        with self._lock:
            seen = self._look(run)
            directory = self._directory(run)
            process = run_files.read_process(directory)
            if seen.phase == Phase.RUNNING and process and process.is_alive:
                self._signal(directory, process.pid, grace_s)
            elif seen.phase in (Phase.RUNNING, Phase.ABSENT) and process is None:
                self._keep_from_starting(run)
            self._free_ended()
            return self._look(run)

    def remove(self, run: Run) -> None:
        """Delete the attempt's directory, and the job's with the last of them. Raises WrongState while it runs."""
        with self._lock:
            if self._look(run).phase == Phase.RUNNING:
                raise WrongState(f"Attempt {run.attempt} of job {run.job} runs.", fix="Stop it first.")
            directory = self._directory(run)
            self._reader.forget(directory.events)
            self._room.give_back(_key(run))
            if child := self._children.pop(_key(run), None):
                _wait_for_exit(child)
            shutil.rmtree(directory.path, ignore_errors=True)
            with suppress(OSError):  # other attempts are in it
                directory.path.parent.rmdir()

    def logs(self, run: Run, *, rank: int, tail: int | None = None, offset: int = 0) -> Iterator[bytes]:
        """What a rank wrote; of the first one, what the trainer itself wrote as long as no rank did."""
        directory = self._directory(run)
        path = directory.log(rank)
        if rank == 0 and not path.exists():
            path = directory.trainer_log
        return run_files.read_log(path, tail=tail, offset=offset)

    def rescue(self, run: Run, *, after_seq: int) -> tuple[Sequence[Event], Mapping[int, bytes]]:
        """Nothing: files of a run stay as long as the job is there."""
        return (), {}

    def tail_logs(self, run: Run) -> Mapping[int, bytes]:
        """None: logs lie in the run's directory as long as the job is there."""
        return {}

    def owner_of(self, namespace: str, pod: str, uid: str) -> Owner | None:
        """None: there are no pods here."""
        return None

    def present(self) -> Sequence[Owner]:
        """None: what is left of attempts goes with their job."""
        return ()

    def foreign(self) -> Sequence[ForeignJob]:
        """None: nobody starts trainers here but the service."""
        return ()

    def foreign_logs(self, uid: str, *, rank: int, tail: int | None = None, offset: int = 0) -> Iterator[bytes]:
        """Of nothing, nothing."""
        return iter(())

    def _directory(self, run: Run) -> RunDirectory:
        return RunDirectory(self._runs / run.namespace / run.job / f"attempt-{run.attempt}")

    def _look(self, run: Run) -> Observation:
        directory = self._directory(run)
        child = self._children.get(_key(run))
        code = child.poll() if child else None  # asked first: a child that ended has written all that it ever will
        if ending := run_files.read_ending(directory):
            return _ended(ending, run_files.read_process(directory))
        process = run_files.read_process(directory)
        if process is None:
            return self._not_announced(run, has_child=child is not None, code=code)
        if process.nonce != run.nonce:
            return _failed(
                FailureClass.INTERNAL,
                f"{directory.path} belongs to another attempt than the recorded one.",
                next_step="Move the directory away and submit again.",
            )
        if process.pid == 0:
            return _failed(FailureClass.PREEMPTED, "The attempt was stopped before its trainer came up.")
        if run_files.is_locked(directory):
            return Observation(phase=Phase.RUNNING, start_time=process.time)
        if ending := run_files.read_ending(directory):  # it ended between the first question and the last
            return _ended(ending, process)
        return _killed(directory, process, code)

    def _not_announced(self, run: Run, *, has_child: bool, code: int | None) -> Observation:
        """No trainer has said that it is there."""
        if not has_child:
            return Observation(phase=Phase.ABSENT)
        if code is None:
            return Observation(phase=Phase.RUNNING, reason="Its trainer starts.")
        if code == TrainerExit.ALREADY_RAN:  # another one holds the lock and has not said so yet
            del self._children[_key(run)]
            return Observation(phase=Phase.RUNNING, reason="Its trainer starts.")
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return _failed(
            FailureClass.INFRA,
            f"The trainer {how} before it came up.",
            next_step=f"Check that {self._python} has the trainer: pip install 'hone-tuning[trainer]', "
            "or set HONE_TRAINER_PYTHON.",
            exit_code=code,
            log_tail=run_files.log_tail(self._directory(run)),
        )

    def _start(self, run: Run, share: Share) -> Observation:
        directory = self._directory(run)
        directory.trainer_log.parent.mkdir(parents=True, exist_ok=True)
        run_files.write_text(directory.run_file, run.to_yaml())
        run_files.write_json(directory.path / _SHARE_FILE, _share_to_json(share))
        crash_point("ensure-before-start")
        environment = {**self._environment, "CUDA_VISIBLE_DEVICES": ",".join(share.gpus)}
        command = [self._python, "-m", "hone_trainer", "run", str(directory.path)]
        try:
            with directory.trainer_log.open("ab") as log:
                # -m looks into the working directory first, so that is one where nobody leaves modules.
                self._children[_key(run)] = subprocess.Popen(
                    command,
                    cwd=directory.path,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            self._room.give_back(_key(run))
            message = f"The trainer cannot be started with {self._python}: {error.strerror or error}."
            return _failed(FailureClass.INFRA, message, next_step="Set HONE_TRAINER_PYTHON to a Python that has it.")
        crash_point("ensure-after-start")
        return Observation(phase=Phase.RUNNING, reason="Its trainer starts.")

    def _signal(self, directory: RunDirectory, pid: int, grace_s: float) -> None:
        asked = directory.path / _STOP_FILE
        with suppress(ProcessLookupError):
            if not asked.exists():
                os.kill(pid, signal.SIGTERM)
                run_files.write_json(asked, {"time": time.time()})
            elif time.time() - asked.stat().st_mtime > grace_s:
                os.killpg(pid, signal.SIGKILL)  # the trainer leads the session that it was started in

    def _keep_from_starting(self, run: Run) -> None:
        """No trainer is there yet; one that this service, or one before it, started may be on its way."""
        directory = self._directory(run)
        if not directory.path.exists():
            self._room.give_back(_key(run))
        elif run_files.claim(directory, run.nonce):
            if child := self._children.get(_key(run)):
                child.kill()
                child.wait()
            self._room.give_back(_key(run))

    def _check_disk(self, plan: Plan) -> None:
        free = self._free_bytes(int(time.monotonic()))
        needed = plan.disk_bytes + sum(plan.output_bytes.values())  # the store may be on the same disk
        if free < needed:
            raise StorageError(
                f"{self._runs} has {free / GIB:.1f} GiB free; the job needs {needed / GIB:.1f} GiB there.",
                fix="Free space, or set HONE_HOME to a directory on another disk.",
            )

    def _look_at_disk(self, _second: int) -> int:
        place = self._runs
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def _find_shares(self) -> None:
        """What the trainers of an earlier service hold."""
        for path in sorted(self._runs.glob(f"*/*/attempt-*/{_SHARE_FILE}")):
            if not _has_ended(RunDirectory(path.parent)) and (share := _read_share(path)):
                self._room.hold(str(path.parent.relative_to(self._runs)), share)

    def _free_ended(self) -> None:
        for key in self._room.held:
            child = self._children.get(key)
            directory = RunDirectory(self._runs / key)
            never_came_up = child is not None and child.poll() is not None and not directory.process.exists()
            if never_came_up or _has_ended(directory):
                self._room.give_back(key)
        for key in [key for key, child in self._children.items() if child.poll() is not None]:
            if _has_ended(RunDirectory(self._runs / key)):
                del self._children[key]


def _refuse_cluster_fields(spec: JobSpec) -> None:
    wanted = []
    if spec.compute.nodes > 1:
        wanted.append(f"compute.nodes: {spec.compute.nodes} needs a cluster, and this service runs on one machine.")
    if spec.scheduling.queue or spec.scheduling.priority:
        wanted.append("scheduling.queue and priority need a cluster: remove them.")
    if wanted:
        raise NotServed(" ".join(wanted))


def _key(run: Run) -> str:
    return f"{run.namespace}/{run.job}/attempt-{run.attempt}"


def _wait_for_exit(child: "subprocess.Popen[bytes]") -> None:
    """It has said how it ended; what is left of its process goes by itself, or is made to."""
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _has_ended(directory: RunDirectory) -> bool:
    return directory.exit.exists() or (directory.process.exists() and not run_files.is_locked(directory))


def _ended(ending: run_files.Ending, process: run_files.TrainerProcess | None) -> Observation:
    start = process.time if process else None
    if ending.exit_code == TrainerExit.SUCCEEDED:
        return Observation(phase=Phase.SUCCEEDED, start_time=start, end_time=ending.time)
    failure = ending.failure or Failure(
        failure_class=FailureClass.INTERNAL,
        message=f"The trainer ended with code {ending.exit_code} and no reason.",
        next_step="Report it as a bug, with the log.",
        exit_code=ending.exit_code,
    )
    final = ending.exit_code in _ENDED_ON_PURPOSE
    return Observation(phase=Phase.FAILED, failure=failure, final=final, start_time=start, end_time=ending.time)


def _killed(directory: RunDirectory, process: run_files.TrainerProcess, code: int | None) -> Observation:
    """No exit.json and a free lock: nobody can say more than when it was last heard."""
    cause = f"signal {-code}" if code is not None and code < 0 else "signal 9 or power loss"
    step = run_files.last_step(directory.events)
    of_all = f" of {step[1]}" if step and step[1] else ""
    where = f"at step {step[0]}{of_all}" if step else "before its first step"
    heard = [path.stat().st_mtime for path in (directory.events, directory.log(0), directory.process) if path.exists()]
    seen = _failed(
        FailureClass.INFRA,
        f"The trainer was killed ({cause}) {where}.",
        next_step="Submit it again. When nobody killed it, look for the kernel's out-of-memory killer in dmesg.",
        exit_code=code,
        log_tail=run_files.log_tail(directory),
    )
    return replace(seen, start_time=process.time, end_time=datetime.fromtimestamp(max(heard), UTC))


def _failed(
    failure_class: FailureClass,
    message: str,
    *,
    next_step: str = "",
    exit_code: int | None = None,
    log_tail: tuple[str, ...] = (),
) -> Observation:
    failure = Failure(
        failure_class=failure_class, message=message, next_step=next_step, exit_code=exit_code, log_tail=log_tail
    )
    return Observation(phase=Phase.FAILED, failure=failure, final=True)


def _visible_gpus(installed: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that this process may use, by the names that its trainers are given."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(str(index) for index in range(installed))
    return tuple(name.strip() for name in visible.split(",") if name.strip())[:installed]


def _share_to_json(share: Share) -> dict[str, object]:
    return {"job": share.job, "needs": vars(share.needs), "gpus": list(share.gpus)}


def _read_share(path: Path) -> Share | None:
    data = run_files.read_json(path)
    return None if data is None else Share(data["job"], Needs(**data["needs"]), tuple(data["gpus"]))
