"""One attempt on one machine, from lock to exit.json: fetch, launch, supervise, publish, and say how it ended.

Called by `python -m hone_trainer run` on a machine of one's own, and by pod.py in a pod. It imports no torch, so that
it starts at once; a worker lives no longer than it. What it leaves is exactly one of: exit.json, or a free lock beside
process.json (it was killed). Of several nodes the first one claims, reports and publishes; every node fetches its own
inputs, starts its own ranks, and says how it ended.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from hone.errors import HoneError
from hone.job import EventType, Failure, Plan
from hone.run import Run, RunDirectory, TrainerExit
from hone_trainer import process
from hone_trainer.failure import RunFailed, classify, failure_of, failure_to_json, log_tail, write_atomically
from hone_trainer.fit import Asked, check_model, check_request, planned, write_plan
from hone_trainer.gang import Alone, Gang, PeerEnded, follow_up
from hone_trainer.inputs import fetch
from hone_trainer.node import Node
from hone_trainer.page import keep_page
from hone_trainer.publish import Publisher
from hone_trainer.push import push_output, tell_pushed, warn_without_token
from hone_trainer.report import EventLog, Printer, Relay, say, sender
from hone_trainer.stop import Stop, interrupt_for_peer, stop_signals
from hone_trainer.trackers import Tracking
from hone_trainer.uploads import Shares, Uploads, fetch_checkpoint
from hone_trainer.workers import Workers

TRACKERS_S = 60.0
"""How long trackers may take to hand on what is left when a run is over."""
TRACKERS_STOPPED_S = 3.0
"""The same where somebody waits for it to stop."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where the supervisor runs; the defaults are those of a machine of one's own."""

    node: Node = field(default_factory=Node)
    asked: Asked | None = None
    """What the Job asks for; None where there is no Job, and the backend has planned for this machine."""
    pod: str = ""
    """Uid of the pod."""
    prints_logs: bool = False
    """Whether what the ranks write goes to stdout too, line by line."""


def supervise(path: Path, setting: Setting = Setting()) -> TrainerExit:  # noqa: B008 (it is frozen)
    """Run the attempt in this directory. The answer is also the process's exit code."""
    directory = RunDirectory(path)
    with _lock(directory) as held:
        if not held:
            say(f"{path} belongs to a trainer that runs, or has run already.")
            return TrainerExit.ALREADY_RAN
        with stop_signals() as stop:
            failure = _Attempt(directory, setting, stop).run()
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


class _Attempt:
    """All of the attempt that this node does."""

    def __init__(self, directory: RunDirectory, setting: Setting, stop: Stop) -> None:
        self._directory, self._setting, self._stop = directory, setting, stop
        self._node = setting.node
        # Other nodes have no events: what they say is their log, their exit code and their termination message.
        self._events = EventLog(directory.events if self._node.is_main else Path(os.devnull))
        self._gang: Alone | Gang = Alone()
        self._publisher: Publisher | None = None
        self._run: Run | None = None
        self._plan: Plan | None = None
        """For the page about the run."""
        self._tracking: Tracking | None = None
        self._printer: Printer | None = None
        self._relay: Relay | None = None

    def run(self) -> Failure | None:
        """What is answered is why it failed, or None."""
        failure: Failure | None
        try:
            text = self._read()
            self._run = run = Run.from_yaml(text)
            self._open(run, text)
            failure = self._train_and_publish(run)
        except PeerEnded as error:
            failure = follow_up(error.failure, node=self._node)
        except BaseException as error:
            failure = self._failure_of(error)
        self._close(failure)
        return failure

    def _read(self) -> str:
        """The run file, read once: whoever changes it later changes nothing."""
        file = self._directory.run_file
        try:
            return file.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise RunFailed(TrainerExit.USER, f"{file} is missing: there is nothing to run.") from error

    def _open(self, run: Run, text: str) -> None:
        """Say that this trainer is there, and give everybody something to follow."""
        directory, node = self._directory, self._node
        record = {"pid": os.getpid(), "start_time": process.start_time(os.getpid()), "nonce": run.nonce}
        write_atomically(directory.process, json.dumps(record))
        logs = {f"[rank {rank}] ": directory.log(rank) for rank in node.ranks(run.launch)}
        shown = {"": directory.trainer_log, **logs} if self._setting.prints_logs else {}
        self._printer = Printer(directory.events, logs=shown)
        if node.is_main and (service := sender(os.environ, run)):
            self._relay = Relay(directory.events, service)
        if self._setting.asked is None:
            node.check(run.launch)
        if run.launch.nodes > 1:
            request_hash = hashlib.sha256(text.encode()).hexdigest()
            self._gang = Gang(node, nodes=run.launch.nodes, request_hash=request_hash, on_end=interrupt_for_peer)

    def _train_and_publish(self, run: Run) -> Failure | None:
        started = time.monotonic()
        scratch = self._directory.scratch
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            with self._stop.at_once():
                if self._prepare(run):
                    return None
            if run.spec.reporting.trackers and self._node.is_main:
                self._tracking = Tracking(run, self._directory, os.environ)
            workers = Workers(run, self._directory, node=self._node, gang=self._gang, environment=os.environ)
            uploads = self._uploads(run)
            try:
                failure = workers.run(self._stop)
            finally:
                uploads.close(until=workers.deadline(self._stop))
            if failure is None:
                self._gang.leave()
                if self._node.is_main:
                    assert self._publisher is not None
                    with self._stop.at_once():
                        self._publisher.publish(scratch, seconds=time.monotonic() - started)
                    push_output(run, self._publisher, self._events, scratch / "outputs", self._stop)
            return failure
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # nothing half-made is left behind

    def _uploads(self, run: Run) -> Uploads:
        """The first node's are whole; others send what is too large for their workers to hand over."""
        assert self._publisher is not None
        keep = run.spec.training.checkpoint.keep
        earlier = [point.place for point in reversed(run.resume)]
        kind = Uploads if self._node.is_main else Shares
        return kind(self._directory.checkpoints, self._publisher, self._events, keep=keep, earlier=earlier)

    def _prepare(self, run: Run) -> bool:
        """Everything before the first rank starts; True when there is nothing left to do.

        The Job is looked at before anything is contacted; the store before anybody is waited for; and nothing is
        fetched before every node is there.
        """
        plan = self._check_job(run)
        self._publisher = Publisher(run, self._events, environment=os.environ, pod=self._setting.pod)
        if result := self._publisher.finished():
            if self._node.is_main:
                self._publisher.tell_finished(result)
                tell_pushed(run, result, self._events)
            say(f"Complete results of this request are in the store already: {', '.join(_places(result))}.")
            return True
        if self._node.is_main:
            self._publisher.claim()
            warn_without_token(run, self._events)
        self._gang.meet()
        self._events.write(EventType.PHASE, "loading", fields={"phase": "loading"})
        inputs = fetch(run, self._directory.scratch / "inputs")
        inputs.write(self._directory.scratch / "inputs.json")
        fetch_checkpoint(run, self._publisher, self._events, self._directory.resume)
        if plan is None and self._setting.asked is not None:
            plan = check_model(run, self._setting.asked, Path(inputs.model.path))
        if plan:
            write_plan(plan, self._directory.scratch / "plan.json")
        self._plan = plan or planned(run, Path(inputs.model.path))
        self._gang.ready()
        return False

    def _check_job(self, run: Run) -> Plan | None:
        if self._setting.asked is None:
            return None
        plan = check_request(run, self._setting.asked, self._node)
        self._node.check(run.launch)
        return plan

    def _failure_of(self, error: BaseException) -> Failure:
        if cause := self._gang.cause:  # the signal that ended the wait came from there
            return follow_up(cause, node=self._node)
        failed = classify(error)
        if failed.code == TrainerExit.INTERNAL:
            say("".join(traceback.format_exception(error)).rstrip())
        return failure_of(failed, log_tail=log_tail(self._directory.trainer_log))

    def _close(self, failure: Failure | None) -> None:
        """Tell everybody how it ended; each for a bounded time."""
        if failure:
            self._gang.tell(failure)
            _report_failure(self._events, failure)
            say(f"{failure.message} {failure.next_step}".rstrip())
        elif self._setting.prints_logs:
            say("Done.")
        self._gang.close()
        if self._publisher:
            if self._node.is_main and self._publisher.owns_job:
                self._keep_trackers()
                self._keep_page(failure)
                with suppress(HoneError):  # the run's own outcome is what counts
                    self._publisher.keep_events(self._directory.events)
            self._publisher.close()
        if self._printer:
            self._printer.close()
        if self._relay:
            self._relay.close()

    def _keep_trackers(self) -> None:
        """Have them hand on what is left, for a bounded time, and store what they wrote here."""
        if self._tracking is None or self._publisher is None:
            return
        timeout_s = TRACKERS_S if self._stop.asked_at is None else TRACKERS_STOPPED_S
        if not self._tracking.close(timeout_s=timeout_s):
            text = f"The trackers did not hand on all of this run within {timeout_s:.0f} s."
            self._events.write(EventType.WARNING, f"{text} See {self._directory.trackers_log}.")
        if not any(self._tracking.directory.rglob("*")):
            return
        try:
            place = self._publisher.keep_trackers(self._tracking.directory)
        except (HoneError, OSError) as error:
            self._events.write(EventType.WARNING, f"What the trackers wrote here is not in the store: {error}")
        else:
            self._events.write(EventType.NOTE, f"What the trackers wrote here: {place}", fields={"trackers": place})

    def _keep_page(self, failure: Failure | None) -> None:
        assert self._run is not None and self._publisher is not None
        try:
            place = keep_page(self._run, self._publisher, self._directory.events, plan=self._plan, failure=failure)
        except Exception as error:  # whatever is wrong with a page, the run's own outcome is what counts
            say(f"There is no page about this run: {error!r}")
        else:
            self._events.write(EventType.NOTE, f"The run on one page: {place}", fields={"report": place})


def _places(result: dict[str, object]) -> list[str]:
    outputs = result["outputs"]
    assert isinstance(outputs, dict)
    return [str(output["uri"]) for output in outputs.values()]


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
