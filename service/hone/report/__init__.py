"""report.html: one run on one page that needs nothing else, made of what its events say.

Called by the trainer when an attempt has ended, and by `hone report` at any time. Pure: equal facts give equal pages.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from hone import quantities as q
from hone.job import Event, EventType, Failure, Plan
from hone.report.charts import SMALL, WIDE, Line, chart
from hone.report.compared import compared
from hone.spec import JobSpec

if TYPE_CHECKING:
    from jinja2 import Template

_NO_CURVES = frozenset({"loss", "max_steps", "epoch", "eta_s", "tokens"})
"""Of a step's metrics: what is drawn first, or is no curve."""
_SHOWN_SAMPLES = 50


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a page tells of."""

    namespace: str
    job: str
    state: str
    spec: JobSpec
    """The resolved request."""
    plan: Plan | None
    """None where the trainer could not make one again."""
    events: Sequence[Event]
    """Of every attempt that is known, in order."""
    failure: Failure | None = None
    attempts: int = 1


@dataclass
class Sample:
    """One prompt and its answers, in order of training."""

    prompt: str
    answers: list[tuple[str, str]] = field(default_factory=list)
    """When (`before`, `step 40`, `after`), and the answer."""
    expected: str = ""


def render(facts: Facts) -> str:
    """The page. Every text of the run is escaped: prompts and answers may hold anything."""
    last = _last_metrics(facts.events)
    return _page().render(
        facts=facts,
        headline=_headline(facts, last),
        charts=_charts(facts.events),
        plan=_plan_rows(facts),
        measured=_measured(facts.events),
        data=_data(facts.events),
        lengths=_lengths(facts.events),
        samples=_samples(facts.events)[:_SHOWN_SAMPLES],
        outputs=[event for event in facts.events if event.type == EventType.OUTPUT],
        notes=[event for event in facts.events if event.type in (EventType.NOTE, EventType.WARNING)],
        versions=_versions(facts.events),
        request=yaml.safe_dump(facts.spec.to_mapping(), sort_keys=False, allow_unicode=True),
        took=_took(facts.events),
        q=q,
    )


@lru_cache
def _page() -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))


def _progress(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event.type == EventType.PROGRESS and event.step is not None]


def _evaluations(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event.type == EventType.EVAL and event.step is not None]


def _last_metrics(events: Sequence[Event]) -> Mapping[str, float]:
    steps = _progress(events)
    return steps[-1].metrics if steps else {}


def _headline(facts: Facts, last: Mapping[str, float]) -> list[tuple[str, str]]:
    """The answer first: what changed, as name and sentence."""
    steps, evaluations = _progress(facts.events), _evaluations(facts.events)
    found = []
    for name, words in (
        ("eval_loss", "evaluation loss"),
        ("eval_rewards/accuracies", "held-out pairs in the right order"),
        ("eval_reward", "reward of held-out prompts"),
    ):
        if values := [event.metrics[name] for event in evaluations if name in event.metrics]:
            found.append((words, _change(values)))
    if losses := [event.metrics["loss"] for event in steps if "loss" in event.metrics]:
        tenth = max(1, len(losses) // 10)
        found.append(("training loss, first and last tenth", _change([fmean(losses[:tenth]), fmean(losses[-tenth:])])))
    if last and steps:
        planned = int(last.get("max_steps", 0))
        found.append(("steps", f"{q.count(steps[-1].step or 0)} of {q.count(planned)}"))
    if "kl" in last:
        found.append(("KL from the reference", f"{last['kl']:.3g} nats"))
    return found


def _change(values: Sequence[float]) -> str:
    return q.loss(values[0]) if len(values) == 1 else f"{q.loss(values[0])} → {q.loss(values[-1])}"


def _charts(events: Sequence[Event]) -> list[tuple[str, list[str], str]]:
    """Title, names of the lines, and SVG of each: the loss first, then everything else that was reported."""
    steps, evaluations = _series(_progress(events)), _series(_evaluations(events))
    names = ["loss", *(name for name in steps if name not in _NO_CURVES)]
    alone = [name for name in evaluations if name.removeprefix("eval_") not in names]
    drawn: list[tuple[str, list[str], str]] = []
    for name in [*names, *alone]:
        lines = [Line(name, steps[name])] if name in steps else []
        for held_out in (f"eval_{name}", name):
            if held_out in evaluations and held_out != "loss":
                lines.append(Line(held_out, evaluations[held_out], is_marked=True))
        if svg := chart(lines, SMALL if drawn else WIDE):
            drawn.append((name, [line.name for line in lines], svg))
    return drawn


def _series(events: Iterable[Event]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        for name, value in event.metrics.items():
            found.setdefault(name, []).append((float(event.step or 0), value))
    return found


def _plan_rows(facts: Facts) -> list[tuple[str, str, str]]:
    """Planned and measured, by what: the rows of one table."""
    if facts.plan is None:
        return []
    plan = facts.plan
    sizes = [
        (one.name, q.size(one.planned_bytes), "–" if one.measured_bytes is None else q.size(one.measured_bytes))
        for one in compared(plan, facts.events)
    ]
    steps, last = _progress(facts.events), _last_metrics(facts.events)
    done = q.count(steps[-1].step or 0) if steps else "–"
    expected = q.count(plan.max_steps or last.get("max_steps", 0)) if plan.max_steps or last else "–"
    rows = [*sizes, ("steps", expected, done)]
    low, high = plan.seconds_low, plan.seconds_high
    expected = f"{q.duration(low)} to {q.duration(high)}" if low is not None and high is not None else "–"
    return [*rows, ("time", expected, _took(facts.events))]


def _metrics_of(events: Sequence[Event], name: str) -> Mapping[str, float]:
    """Metrics of the last event that has this one."""
    return next((event.metrics for event in reversed(events) if name in event.metrics), {})


def _measured(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Seconds of each phase of the last attempt, as its events began them."""
    starts = [event for event in events if event.type == EventType.PHASE]
    starts = [event for event in starts if event.attempt == starts[-1].attempt]
    ends = [*[event.time for event in starts[1:]], events[-1].time] if starts else []
    found: dict[str, float] = {}
    for event, end in zip(starts, ends, strict=True):
        phase = event.fields.get("phase", event.message)
        found[phase] = found.get(phase, 0.0) + (end - event.time).total_seconds()
    return [(phase, q.duration(seconds)) for phase, seconds in found.items()]


def _data(events: Sequence[Event]) -> list[tuple[str, str, str]]:
    """Counts of the data report: what, in training, in the evaluation."""
    metrics = _metrics_of([event for event in events if event.type == EventType.DATA], "rows")
    names = [name for name in metrics if not name.startswith(("eval_", "lengths/"))]
    return [
        (name.replace("_", " "), _number(metrics[name]), _number(metrics.get(f"eval_{name}")))
        for name in names
        if metrics[name] or metrics.get(f"eval_{name}")
    ]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return q.count(value) if float(value).is_integer() else f"{value:.4g}"


def _lengths(events: Sequence[Event]) -> list[tuple[str, str, float]]:
    """How many rows have up to so many tokens: label, rows, share of the largest."""
    metrics = _metrics_of([event for event in events if event.type == EventType.DATA], "rows")
    found = [(int(name.partition("/")[2]), value) for name, value in metrics.items() if name.startswith("lengths/")]
    most = max((value for _, value in found), default=0.0)
    return [(f"up to {q.count(upto)}", q.count(rows), rows / most) for upto, rows in sorted(found) if most]


def _samples(events: Iterable[Event]) -> list[Sample]:
    found: dict[str, Sample] = {}
    for event in events:
        if event.type == EventType.SAMPLE:
            prompt, when = event.fields.get("prompt", ""), event.fields.get("when", "after")
            sample = found.setdefault(prompt, Sample(prompt))
            sample.expected = event.fields.get("expected", "") or sample.expected
            at = when if when in ("before", "after") else f"step {q.count(event.step or 0)}"
            sample.answers.append((at, event.fields.get("answer", "")))
    return list(found.values())


def _versions(events: Sequence[Event]) -> dict[str, Any]:
    text = next((event.fields["versions"] for event in reversed(events) if "versions" in event.fields), "{}")
    found: dict[str, Any] = json.loads(text)
    return found


def _took(events: Sequence[Event]) -> str:
    times: list[datetime] = [event.time for event in events]
    return q.duration((times[-1] - times[0]).total_seconds()) if times else "–"
