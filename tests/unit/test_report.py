"""The page about a run, and its charts."""

import math
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from hone.job import Event, Failure, FailureClass
from hone.report import Facts, render
from hone.report.charts import MAX_POINTS, Line, chart, smoothed, thinned
from hone.report.compared import compared

from .test_plan import plan

START = datetime(2026, 1, 1, tzinfo=UTC)


def event(kind: str, second: int, message: str = "", **rest: Any) -> Event:
    return Event(
        seq=second + 1, time=START + timedelta(seconds=second), type=kind, message=message, **{"attempt": 1, **rest}
    )


RUN = [
    event("phase", 0, "loading", fields={"phase": "loading"}),
    event("data", 5, "rows", metrics={"rows": 8, "rows_dropped": 0, "eval_rows": 2, "lengths/16": 2, "lengths/32": 6}),
    event("sample", 6, step=0, fields={"when": "before", "prompt": "What is <b>?", "answer": "no", "expected": "bold"}),
    event("eval", 7, step=0, metrics={"eval_loss": 5.5}),
    event("phase", 8, "training", fields={"phase": "training"}),
    *(event("progress", 9 + n, step=n, metrics={"loss": 4 / n, "max_steps": 3, "kl": 0.1 * n}) for n in (1, 2, 3)),
    event("eval", 20, step=3, metrics={"eval_loss": 5.25}),
    event("sample", 21, step=3, fields={"when": "after", "prompt": "What is <b>?", "answer": "<script>x</script>"}),
    event("note", 22, "Peak", metrics={"peak_host_bytes": 3 * 2**30}, fields={"versions": '{"torch": "2.13.0"}'}),
    event("output", 23, fields={"kind": "adapter", "uri": "file:///a", "size_bytes": "2048", "sha256": "0a" * 32}),
]  # fmt: skip


class Page(HTMLParser):
    """Elements and addresses of a page, and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.words))


def page(events: list[Event] = RUN, **changes: Any) -> Page:
    made = plan()
    facts = {"namespace": "team-a", "job": "demo-abcde", "state": "SUCCEEDED", "spec": made.spec, "plan": made.plan}
    return Page(render(Facts(**{**facts, "events": events, **changes})))


def test_the_page_says_first_what_changed_and_holds_all_that_a_run_told() -> None:
    text = page().text
    assert "evaluation loss 5.5 → 5.25" in text
    assert "training loss, first and last tenth 4 → 1.333" in text
    assert "steps 3 of 3" in text
    assert re.search(r"H200, allocated \S+ GiB – H200, reserved \S+ GiB – host, a process \S+ GiB 3.0 GiB", text)
    assert "up to 32 6" in text
    assert "adapter/ file:///a" in text
    assert "torch 2.13.0" in text


def test_the_page_loads_nothing_and_runs_nothing_whatever_a_model_answers() -> None:
    found = page()
    assert "script" not in found.tags
    assert not found.addresses
    assert "<script>x</script>" in found.text  # as text
    assert "What is <b>?" in found.text


def test_a_plan_is_held_against_what_was_measured() -> None:
    made = plan().plan
    peaks = {"peak_host_bytes": 3.0 * 2**30, "peak_gpu_bytes": 2.0 * 2**30, "peak_gpu_reserved_bytes": 2.5 * 2**30}
    [(kind, size)] = made.output_bytes.items()
    output = event("output", 9, fields={"kind": kind, "size_bytes": str(2 * size)})
    found = {one.name: one for one in compared(made, [event("note", 8, metrics=peaks), output])}
    allocated, reserved = found[f"{made.gpu}, allocated"], found[f"{made.gpu}, reserved"]
    sizes = {item.name: item.size_bytes for item in made.memory}
    assert allocated.planned_bytes == made.peak_bytes - sizes["context"] - sizes["fragmentation"] - sizes["margin"]
    assert reserved.planned_bytes - allocated.planned_bytes == sizes["fragmentation"]
    assert (allocated.measured_bytes, reserved.measured_bytes) == (2 * 2**30, 2.5 * 2**30)
    assert found["host, a process"].measured_bytes == 3 * 2**30
    assert found[f"{kind}/"].ratio == 2.0
    assert all(one.measured_bytes is None for one in compared(made, []))


def test_samples_are_told_in_order_of_training_under_their_prompt() -> None:
    during = event("sample", 10, step=2, fields={"when": "during", "prompt": "What is <b>?", "answer": "well"})
    text = page(sorted([*RUN, during], key=lambda one: one.time)).text
    assert "What is <b>? before no step 2 well after <script>x</script> expected bold" in text


def test_a_run_that_failed_says_why_and_what_to_do_and_one_without_events_is_a_page_too() -> None:
    failure = Failure(failure_class=FailureClass.DATA, message="Row 3 has no text.", next_step="Mend it.", rank=1)
    text = page([], state="FAILED", failure=failure, plan=None).text
    assert "DATA: Row 3 has no text. (rank 1)" in text
    assert "Next: Mend it." in text


def lines_of(svg: str) -> list[list[tuple[float, float]]]:
    drawn = ElementTree.fromstring(svg).iter("polyline")
    return [[tuple(map(float, place.split(","))) for place in line.get("points", "").split()] for line in drawn]  # type: ignore[misc]


def test_a_line_falls_on_the_page_as_its_values_fall() -> None:
    [line] = lines_of(chart([Line("loss", [(1, 4.0), (2, 2.0), (3, 1.0)])]))
    assert all(left < right and above < below for (left, above), (right, below) in pairwise(line))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_breaks_the_line_and_nothing_else(value: float) -> None:
    found = lines_of(chart([Line("loss", [(1, 1.0), (2, 1.0), (3, value), (4, 2.0), (5, 2.0)])]))
    assert [len(part) for part in found] == [2, 2]


def test_a_run_that_went_back_to_a_checkpoint_is_drawn_as_two_lines() -> None:
    found = lines_of(chart([Line("loss", [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.0), (3, 1.0)])]))
    assert [len(part) for part in found] == [3, 2]


def test_many_points_are_drawn_as_few_with_the_same_mean() -> None:
    points = [(float(step), float(step % 7)) for step in range(1, 10 * MAX_POINTS + 1)]
    few = thinned(points)
    assert len(few) == MAX_POINTS
    assert few[-1][0] == points[-1][0]
    assert sum(value for _, value in few) / len(few) == pytest.approx(sum(value for _, value in points) / len(points))


def test_a_running_mean_begins_at_the_first_value_and_stays_at_a_constant() -> None:
    assert [value for _, value in smoothed([(float(step), 2.0) for step in range(100)])] == pytest.approx([2.0] * 100)
    assert smoothed([(0.0, 5.0), (1.0, 1.0)])[0][1] == pytest.approx(5.0)


@pytest.mark.parametrize("values", [[], [math.nan], [2.0], [0.0, 0.0], [1e-9, 1e9], [-3.0, -3.0 + 1e-12]])
def test_no_values_make_no_chart_and_any_others_make_one(values: list[float]) -> None:
    svg = chart([Line("kl", list(enumerate(values)))])
    assert bool(svg) == any(math.isfinite(value) for value in values)


@pytest.mark.parametrize(("values", "drawn"), [([1.0, 2.0, 3.0] * 9, ["raw", "curve"]), ([1.0, 2.0, 3.0], ["curve"])])
def test_only_a_line_that_goes_up_and_down_has_a_running_mean_over_it(values: list[float], drawn: list[str]) -> None:
    svg = ElementTree.fromstring(chart([Line("loss", list(enumerate(values)))]))
    assert [line.get("class") for line in svg.iter("polyline")] == drawn
