"""Everything that a method needs, in one place; built once by the worker of each rank."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from hone.job import EventType
from hone.run import Run, RunDirectory
from hone_trainer.inputs import Inputs
from hone_trainer.report import EventLog
from hone_trainer.stop import interrupted


class StopSignal:
    """SIGTERM as a training run has to take it: at the end of a step while it trains, at once elsewhere."""

    def __init__(self) -> None:
        self.asked = False
        self._deferred = False

    def install(self) -> None:
        """Take over SIGTERM; SIGINT is the supervisor's to pass on."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While it trains: the flag is set, and every rank stops at the end of the same step."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def leave(self) -> None:
        """Another rank was asked: raise INTERRUPTED, but while it trains note it only."""
        self.asked = True
        if not self._deferred:
            raise interrupted()

    def check(self) -> None:
        """Raise INTERRUPTED when a signal came."""
        if self.asked:
            raise interrupted()

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True
        if first and not self._deferred:
            raise interrupted()


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """One rank's view of the run."""

    run: Run
    directory: RunDirectory
    inputs: Inputs
    events: EventLog
    rank: int
    """In the whole run."""
    world_size: int
    local_rank: int = 0
    """On this machine."""
    stop: StopSignal = field(default_factory=StopSignal)

    @property
    def is_main(self) -> bool:
        """Whether this rank reports and saves."""
        return self.rank == 0

    @property
    def leads_node(self) -> bool:
        """Whether this rank does once for its machine what every rank there needs; machines share no files."""
        return self.local_rank == 0

    @property
    def scratch(self) -> Path:
        """Working files, gone when the run has succeeded."""
        return self.directory.scratch

    def output(self, kind: str) -> Path:
        """Where an output is made before the supervisor publishes it."""
        path = self.scratch / "outputs" / kind
        path.mkdir(parents=True, exist_ok=True)
        return path

    def event(
        self,
        kind: EventType,
        message: str = "",
        *,
        step: int | None = None,
        metrics: dict[str, float] | None = None,
        fields: dict[str, str] | None = None,
    ) -> None:
        """Report; the first rank speaks for all."""
        if self.is_main:
            self.events.write(kind, message, step=step, metrics=metrics, fields=fields)

    def phase(self, name: str) -> None:
        """Say what is being done now."""
        self.event(EventType.PHASE, name, fields={"phase": name})
