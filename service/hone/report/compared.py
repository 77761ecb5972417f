"""What a plan said against what the run took, in bytes. Called by the page about a run and by `hone plan --compare`."""

from collections.abc import Sequence
from dataclasses import dataclass

from hone.job import Event, EventType, Plan

_NOT_ALLOCATED = ("context", "fragmentation", "margin")
_NOT_RESERVED = ("context", "margin")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One figure of a plan that can be measured."""

    name: str
    planned_bytes: int
    measured_bytes: int | None
    """None where the run has not told it."""
    lines: tuple[str, ...] = ()
    """Lines of the plan that it is the sum of."""

    @property
    def ratio(self) -> float | None:
        """Measured in units of planned."""
        return self.measured_bytes / self.planned_bytes if self.measured_bytes and self.planned_bytes else None


def compared(plan: Plan, events: Sequence[Event]) -> tuple[Compared, ...]:
    """Memory of the first rank and sizes of the outputs.

    PyTorch's allocator sees neither the CUDA context nor the plan's margin; what it reserves holds its fragmentation.
    """
    told = next((event.metrics for event in reversed(events) if "peak_host_bytes" in event.metrics), {})

    def measured(name: str) -> int | None:
        return int(told[name]) if name in told else None

    def sum_of(name: str, without: tuple[str, ...], figure: str) -> Compared:
        items = [item for item in plan.memory if item.name not in without]
        size = sum(item.size_bytes for item in items)
        lines = tuple(item.name for item in items)
        return Compared(name=name, planned_bytes=size, measured_bytes=measured(figure), lines=lines)

    if plan.launch.device == "cuda":
        host = plan.host_memory_bytes // plan.launch.processes_per_node
        rows = [
            sum_of(f"{plan.gpu}, allocated", _NOT_ALLOCATED, "peak_gpu_bytes"),
            sum_of(f"{plan.gpu}, reserved", _NOT_RESERVED, "peak_gpu_reserved_bytes"),
            Compared(name="host, a process", planned_bytes=host, measured_bytes=measured("peak_host_bytes")),
        ]
    else:
        rows = [sum_of("a process", ("margin",), "peak_host_bytes")]
    sizes = {event.fields["kind"]: int(event.fields["size_bytes"]) for event in events if _is_output(event)}
    return (
        *rows,
        *(
            Compared(name=f"{kind}/", planned_bytes=planned, measured_bytes=sizes.get(kind))
            for kind, planned in plan.output_bytes.items()
        ),
    )


def _is_output(event: Event) -> bool:
    return event.type == EventType.OUTPUT and event.fields.get("size_bytes", "").isdigit()
