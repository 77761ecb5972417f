"""One attempt on one machine, from lock to exit.json: fetch, launch, supervise, publish, and say how it ended.

Called by `python -m hone_trainer run`. It imports no torch, so that it starts at once; a worker lives no longer than
it.
What it leaves is exactly one of: exit.json, or a free lock beside process.json (it was killed).
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from hone.errors import HoneError
from hone.job import EventType, Failure
from hone.run import Run, RunDirectory, TrainerExit
from hone_trainer import launch, process
from hone_trainer.failure import (
    RunFailed,
    classify,
    failure_of,
    failure_to_json,
    log_tail,
    read_error,
    worker_died,
    write_atomically,
)
from hone_trainer.inputs import fetch
from hone_trainer.publish import Publisher
from hone_trainer.report import EventLog, Relay, sender

GRACE_S = 60.0
"""How long workers have to stop after SIGTERM; the backend's own grace may be shorter."""
_POLL_S = 0.05


def supervise(path: Path) -> TrainerExit:
    """Run the attempt in this directory. The answer is also the process's exit code."""
    directory = RunDirectory(path)
    with _lock(directory) as held:
        if not held:
            sys.stderr.write(f"{path} belongs to a trainer that runs, or has run already.\n")
            return TrainerExit.ALREADY_RAN
        events = EventLog(directory.events)
        with _stop_signals() as stop:
            failure = _attempt(directory, events, stop)
        code = TrainerExit(failure.exit_code or 0) if failure else TrainerExit.SUCCEEDED
        write_atomically(directory.exit, json.dumps(_exit_record(code, failure)))
        return code


@contextmanager
def _lock(directory: RunDirectory) -> Iterator[bool]:
    """Hold the attempt's directory; False when another trainer holds it, or had it."""
    with directory.lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not directory.process.exists()


class Stop:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self._at_once = False

    def ask(self, _signal: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        self.asked_at = self.asked_at or time.monotonic()
        if self._at_once:
            self._at_once = False  # a second signal must not interrupt the way out
            raise _interrupted()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A phase of the supervisor's own, such as a download: a signal ends it where it stands."""
        if self.asked_at is not None:
            raise _interrupted()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


@contextmanager
def _stop_signals() -> Iterator[Stop]:
    stop = Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _attempt(directory: RunDirectory, events: EventLog, stop: Stop) -> Failure | None:
    """All of the attempt; what is answered is why it failed, or None."""
    relay: Relay | None = None
    try:
        run = _read(directory)
        _announce(directory, run)
        relay = Relay(directory.events, send=sender(os.environ.get("HONE_REPORT_ADDRESS"), run))
        failure = _train_and_publish(directory, run, events, stop)
    except BaseException as error:
        failed = classify(error)
        if failed.code == TrainerExit.INTERNAL:
            sys.excepthook(type(error), error, error.__traceback__)
        failure = failure_of(failed, log_tail=log_tail(directory.trainer_log))
    if failure:
        _report_failure(events, failure)
    if relay:
        relay.close()
    return failure


def _read(directory: RunDirectory) -> Run:
    try:
        return Run.from_yaml(directory.run_file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFailed(TrainerExit.USER, f"{directory.run_file} is missing: there is nothing to run.") from error


def _announce(directory: RunDirectory, run: Run) -> None:
    record = {"pid": os.getpid(), "start_time": process.start_time(os.getpid()), "nonce": run.nonce}
    write_atomically(directory.process, json.dumps(record))


def _train_and_publish(directory: RunDirectory, run: Run, events: EventLog, stop: Stop) -> Failure | None:
    started = time.monotonic()
    directory.scratch.mkdir(parents=True, exist_ok=True)
    directory.log(0).parent.mkdir(parents=True, exist_ok=True)
    publisher = Publisher(run, events)
    try:
        with stop.at_once():
            publisher.claim()
            events.write(EventType.PHASE, "loading", fields={"phase": "loading"})
            fetch(run, directory.scratch / "inputs").write(directory.scratch / "inputs.json")
        failure = _run_workers(directory, run, stop)
        if failure is None:
            with stop.at_once():
                publisher.publish(directory.scratch, seconds=time.monotonic() - started)
        return failure
    finally:
        shutil.rmtree(directory.scratch, ignore_errors=True)  # nothing half-made is left behind
        with suppress(HoneError):  # the run's own outcome is what counts
            publisher.keep_events(directory.events)
        publisher.close()


def _run_workers(directory: RunDirectory, run: Run, stop: Stop) -> Failure | None:
    """Start the workers, pass signals on, wait for the end; what is answered is the first failure."""
    command = launch.command(run.launch, directory.path)
    environment = launch.environment(run.launch, directory.scratch, os.environ)
    direct = run.launch.launcher == "direct"
    log = directory.log(0) if direct else directory.trainer_log
    with log.open("ab") as output:
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        code = _wait(child, directory, run, stop)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    return _outcome(directory, run, code, asked_to_stop=stop.asked_at is not None)


def _wait(child: "subprocess.Popen[bytes]", directory: RunDirectory, run: Run, stop: Stop) -> int:
    passed_on = False
    while True:
        try:
            return child.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            pass
        if stop.asked_at is None:
            continue
        if not passed_on:
            passed_on = _pass_on(child, directory, run)
        if time.monotonic() - stop.asked_at > GRACE_S:
            child.kill()


def _pass_on(child: "subprocess.Popen[bytes]", directory: RunDirectory, run: Run) -> bool:
    """Ask the workers themselves to stop: a launcher would kill them after 30 seconds of its own.

    False while a worker cannot hear yet (it installs its handler first thing, and then says that it is there).
    """
    ready = [directory.scratch / f"worker-{rank}.pid" for rank in range(run.launch.world_size)]
    if not all(path.exists() for path in ready):
        return False
    for path in ready:
        with suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGTERM)
    return True


def _outcome(directory: RunDirectory, run: Run, code: int, *, asked_to_stop: bool) -> Failure | None:
    """Why the workers ended: the first error of a rank's own, or a rank that was killed, or what its peers saw."""
    if code == 0:
        if (directory.scratch / "worker.json").exists():
            return None
        raise RunFailed(TrainerExit.INTERNAL, "The workers ended without an error and without a result.")
    told = _told(directory, run)
    own = [failure for failure in told if failure.exit_code != TrainerExit.WORKER_DIED]
    if own:
        return own[0]
    if asked_to_stop:
        return failure_of(_interrupted())
    killed = (0, -code) if code < 0 else launch.killed_rank(log_tail(directory.trainer_log, lines=200))
    if killed:
        return worker_died(directory, rank=killed[0], signal_number=killed[1])
    return told[0] if told else _silent_end(directory, run, code)


def _told(directory: RunDirectory, run: Run) -> list[Failure]:
    """What the ranks said, the earliest first."""
    files = {rank: directory.error(rank) for rank in range(run.launch.world_size)}
    times = sorted((file.stat().st_mtime_ns, rank) for rank, file in files.items() if file.exists())
    return [failure for _, rank in times if (failure := read_error(directory, rank))]


def _silent_end(directory: RunDirectory, run: Run, code: int) -> Failure:
    """A worker fell before it could speak."""
    log = directory.log(0) if run.launch.launcher == "direct" else directory.trainer_log
    error = RunFailed(
        TrainerExit.INTERNAL, f"The workers ended with code {code} before they could say why.", fix=f"Read {log}."
    )
    return failure_of(error, rank=0, log_tail=log_tail(log))


def _interrupted() -> RunFailed:
    return RunFailed(TrainerExit.INTERRUPTED, "The run was asked to stop (SIGTERM) and stopped.")


def _report_failure(events: EventLog, failure: Failure) -> None:
    fields = {
        "failure_class": str(failure.failure_class),
        "next_step": failure.next_step,
        "exit_code": str(failure.exit_code),
        "log_tail": "\n".join(failure.log_tail),
    }
    if failure.rank is not None:
        fields["rank"] = str(failure.rank)
    events.write(EventType.FAILURE, failure.message, fields=fields)


def _exit_record(code: TrainerExit, failure: Failure | None) -> dict[str, object]:
    return {
        "exit_code": int(code),
        "failure": failure_to_json(failure) if failure else None,
        "end_time": datetime.now(UTC).isoformat(),
    }
