"""The ranks of this machine: started, asked to stop, and why they ended.

Called by the supervisor once inputs are there. A worker's own reason counts before what its launcher or its peers saw,
and the reason of another node before the failed connection that it caused here.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from hone.job import Failure
from hone.manifests import names
from hone.run import FOLLOW_UPS, Run, RunDirectory, TrainerExit
from hone_trainer import launch
from hone_trainer.cgroup import memory_kills
from hone_trainer.failure import RunFailed, failure_of, log_tail, read_error, worker_died
from hone_trainer.gang import Alone, Gang, follow_up
from hone_trainer.node import Node
from hone_trainer.stop import Stop, interrupted

GRACE_S = 80.0
"""Time between SIGTERM and SIGKILL that the supervisor itself is given, where HONE_GRACE_S does not say it."""
TELLING_S = 20.0
"""Of that, what it needs to send the last checkpoint and to tell how the run ended; the rest is the workers'."""
CLOSING_S = 5.0
"""Of that, what telling alone needs."""
_POLL_S = 0.1


class Workers:
    """All ranks of one node, through one launcher or as one process."""

    def __init__(
        self, run: Run, directory: RunDirectory, *, node: Node, gang: Alone | Gang, environment: Mapping[str, str]
    ) -> None:
        self._run, self._directory, self._node, self._gang = run, directory, node, gang
        self._environment = environment
        self._ranks = node.ranks(run.launch)
        grace_s = float(environment.get(names.ENV_GRACE_S) or GRACE_S)
        self._grace_s = max(grace_s - TELLING_S, grace_s / 2)
        self._sending_s = max(grace_s - CLOSING_S, grace_s * 3 / 4)
        self._is_direct = run.launch.launcher == "direct"
        self._log = directory.log(self._ranks[0]) if self._is_direct else directory.trainer_log

    def run(self, stop: Stop) -> Failure | None:
        """Start them, pass signals on, wait for the end; what is answered is why they failed."""
        threads = launch.threads_of(self._run.launch, self._environment)
        command = launch.command(self._run.launch, self._directory.path, node=self._node, threads=threads)
        environment = launch.environment(self._run.launch, self._directory.scratch, self._environment, threads=threads)
        killed_before = memory_kills()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as output:
            child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            code = self._wait(child, stop)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        cause = self._gang.cause
        if code == 0 and cause is None:
            self._check_result()
            return None
        return self._why(code, cause, stop, is_out_of_memory=memory_kills() > killed_before)

    def deadline(self, stop: Stop) -> float | None:
        """Until when the last checkpoint may be sent, by the monotonic clock; None where nobody asked it to stop."""
        return None if stop.asked_at is None else stop.asked_at + self._sending_s

    def _wait(self, child: "subprocess.Popen[bytes]", stop: Stop) -> int:
        passed_on, over = False, threading.Event()

        def wait() -> None:
            child.wait()  # with a timeout it would look a hundred times a second, at the cost of what trains
            over.set()

        threading.Thread(target=wait, name="workers", daemon=True).start()
        while not over.wait(_POLL_S):
            if self._gang.cause:  # its ranks wait for peers that never come
                child.kill()
            if stop.asked_at is None:
                continue
            if not passed_on:
                passed_on = self._pass_on()
            if time.monotonic() - stop.asked_at > self._grace_s:
                child.kill()
        return int(child.returncode)

    def _pass_on(self) -> bool:
        """Ask the workers themselves to stop: a launcher would kill them after 30 seconds of its own.

        False while a worker cannot hear yet (it installs its handler first thing, and then says that it is there).
        """
        ready = [self._directory.scratch / f"worker-{rank}.pid" for rank in self._ranks]
        if not all(path.exists() for path in ready):
            return False
        for path in ready:
            with suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGTERM)
        return True

    def _check_result(self) -> None:
        if self._node.is_main and not (self._directory.scratch / "worker.json").exists():
            raise RunFailed(TrainerExit.INTERNAL, "The workers ended without an error and without a result.")

    def _why(self, code: int, cause: Failure | None, stop: Stop, *, is_out_of_memory: bool) -> Failure:
        if cause and cause.exit_code not in FOLLOW_UPS:
            return follow_up(cause, node=self._node)
        told = self._told()
        own = [failure for failure in told if failure.exit_code not in FOLLOW_UPS]
        if own:
            return own[0]
        if stop.asked_at is not None:
            return failure_of(interrupted())
        killed = (self._ranks[0], -code) if code < 0 else launch.killed_rank(log_tail(self._log, lines=200))
        if killed and not cause:
            return self._killed(*killed, is_out_of_memory=is_out_of_memory)
        if cause := cause or self._gang.wait_for_cause():
            return follow_up(cause, node=self._node)
        return told[0] if told else self._silent_end(code)

    def _killed(self, rank: int, number: int, *, is_out_of_memory: bool) -> Failure:
        limit = None
        if number == signal.SIGKILL and is_out_of_memory:
            limit = int(self._environment.get(names.ENV_MEMORY_LIMIT_BYTES) or 0)
        return worker_died(self._directory, rank=rank, signal_number=number, memory_limit_bytes=limit)

    def _told(self) -> list[Failure]:
        """What the ranks said, the earliest first."""
        files = {rank: self._directory.error(rank) for rank in self._ranks}
        times = sorted((file.stat().st_mtime_ns, rank) for rank, file in files.items() if file.exists())
        return [failure for _, rank in times if (failure := read_error(self._directory, rank))]

    def _silent_end(self, code: int) -> Failure:
        """A worker fell before it could speak; or its launcher, which never came so far as to start one."""
        error = RunFailed(
            TrainerExit.INTERNAL,
            f"The workers ended with code {code} before they could say why.",
            fix=f"Read {self._log}.",
        )
        if self._run.launch.nodes > 1 and not self._directory.log(self._ranks[0]).exists():
            error = RunFailed(
                TrainerExit.WRONG_WORLD,
                f"The launcher of node {self._node.rank} ended with code {code} before it started a rank.",
                fix=f"Check that nodes reach port {self._node.main_port} of the first one (NetworkPolicy), and that "
                "it is free there.",
            )
        return failure_of(error, rank=self._ranks[0], log_tail=log_tail(self._log))
