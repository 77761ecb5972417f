"""Checkpoints between a worker and the store: sent while training goes on, fetched before it begins.

Called by the supervisor. What is told of is complete in the store; what was not sent when the machine went away is
lost, and the run goes on from the one before.
"""

import json
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from hone.errors import HoneError, IntegrityError, NotFound, StorageUnavailable
from hone.job import EventType
from hone.run import Run
from hone.storage import ManifestFile
from hone_trainer.failure import RunFailed
from hone_trainer.publish import Publisher
from hone_trainer.report import EventLog

POLL_S = 0.1
RETRY_S = 10.0
"""Between two tries at a store that fails."""
SHARES_S = 300.0
"""How long the first node waits for what the others send."""
ELSEWHERE = ".hone-elsewhere.json"
"""Which files of a checkpoint other nodes have, as its manifest lists them; no part of it."""


class Uploads:
    """Sends checkpoints as they come, in a thread; the newest counts, and no more than `keep` stay in the store."""

    def __init__(
        self, made: Path, publisher: Publisher, events: EventLog, *, keep: int, earlier: Sequence[str] = ()
    ) -> None:
        """`made` is where workers leave them; `earlier` are the places of earlier attempts' own, the oldest first."""
        self._made, self._publisher, self._events, self._keep = made, publisher, events, keep
        self._sent = list(earlier)
        """Places, the oldest first."""
        self._closing = threading.Event()
        self._is_over = False
        self._has_failed = False
        self._thread = threading.Thread(target=self._follow, name="checkpoints", daemon=True)
        self._thread.start()

    def close(self, *, until: float | None) -> None:
        """Send what is left, and stop; at the latest at `until` by the monotonic clock."""
        self._closing.set()
        self._thread.join(None if until is None else max(0.0, until - time.monotonic()))
        self._is_over = True

    def _follow(self) -> None:
        while not self._is_over:
            is_last = self._closing.is_set()
            waiting = sorted(self._made.glob("step-*"))
            for old in waiting[:-1]:  # the store is slower than training: what is newer is worth more
                shutil.rmtree(old, ignore_errors=True)
            if waiting and not self._send(waiting[-1]) and not is_last:
                self._closing.wait(RETRY_S)
            elif is_last:
                return
            else:
                self._closing.wait(POLL_S)

    def _send(self, folder: Path) -> bool:
        step = int(folder.name.removeprefix("step-"))
        try:
            self._store(folder, step)
        except (HoneError, RunFailed) as error:
            if not self._has_failed:
                self._has_failed = True
                self._events.write(EventType.WARNING, f"The checkpoint of step {step} cannot be stored: {error}")
            return False
        self._has_failed = False
        shutil.rmtree(folder, ignore_errors=True)
        return True

    def _store(self, folder: Path, step: int) -> None:
        elsewhere = _elsewhere(folder)
        self._wait_for(elsewhere, folder, step)
        removed = self._sent[: max(0, len(self._sent) + 1 - self._keep)]
        place = self._publisher.publish_checkpoint(folder, step=step, removes=removed, elsewhere=elsewhere)
        self._sent = [*self._sent[len(removed) :], place]

    def _wait_for(self, files: Sequence[ManifestFile], folder: Path, step: int) -> None:
        """Until other nodes have sent theirs; they may have gone on to a newer checkpoint, as this one then does."""
        deadline = time.monotonic() + SHARES_S
        while not self._publisher.has_shares(step, files):
            if self._is_over or time.monotonic() > deadline or max(self._made.glob("step-*")) != folder:
                raise StorageUnavailable("other nodes have not sent their share of it.")
            time.sleep(POLL_S)


class Shares(Uploads):
    """The same of a node that is not the first: it sends what its own ranks have split among them."""

    def _store(self, folder: Path, step: int) -> None:
        self._publisher.send_share(folder, step=step)


def _elsewhere(folder: Path) -> tuple[ManifestFile, ...]:
    file = folder / ELSEWHERE
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return tuple(ManifestFile(**entry) for entry in found)


def fetch_checkpoint(run: Run, publisher: Publisher, events: EventLog, target: Path) -> None:
    """Bring the newest checkpoint that is what the service recorded; nothing where none is left."""
    for point in run.resume:
        try:
            publisher.fetch_checkpoint(point, target)
        except (NotFound, IntegrityError) as error:
            events.write(EventType.WARNING, f"The checkpoint of step {point.step} cannot be used: {error}")
            shutil.rmtree(target, ignore_errors=True)
            continue
        events.write(EventType.NOTE, f"It goes on from the checkpoint of step {point.step}.", step=point.step)
        return
    if run.resume:
        events.write(EventType.WARNING, "No checkpoint can be used: it starts from the beginning.")
