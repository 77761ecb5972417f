"""Line charts as SVG, for a page without scripts. Pure; called by the report's page.

Markup is made by ElementTree, so no text can become an element; colours come from the page's style sheet.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree

WIDE, SMALL = (1000, 260), (330, 150)
"""Sizes of a chart, in units of about a pixel."""
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 22
MAX_POINTS = 600
"""Of one line; where there are more, neighbours are drawn as their mean."""
NOISY = 5.0
"""A line that goes so many times its own range up and down has a running mean drawn over it."""
_TICKS = 4


@dataclass(frozen=True)
class Line:
    """One curve: (step, value), in order of step; what is no number breaks it."""

    name: str
    points: Sequence[tuple[float, float]]
    is_marked: bool = False
    """Few points, each worth a dot: evaluations."""


def chart(lines: Sequence[Line], size: tuple[int, int] = SMALL) -> str:
    """An `<svg>` of the lines over a common pair of axes; empty where there is nothing to draw."""
    lines = [Line(line.name, thinned(line.points), line.is_marked) for line in lines]
    finite = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not finite:
        return ""
    frame = _Frame.around(finite, size)
    svg = ElementTree.Element("svg", viewBox=f"0 0 {frame.width} {frame.height}", role="img")
    _text(svg, "title", ", ".join(line.name for line in lines))
    _axes(svg, frame)
    for number, line in enumerate(lines):
        _draw(svg, frame, line, number)
    return ElementTree.tostring(svg, encoding="unicode")


def thinned(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: the mean of neighbours, of which a value that is no number makes none."""
    if len(points) <= limit:
        return list(points)
    parts = [points[len(points) * i // limit : len(points) * (i + 1) // limit] for i in range(limit)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential running mean over about a twentieth of the points, without the bias of its start."""
    keep, mean, weight, found = 1 - 20 / max(len(points), 20), 0.0, 0.0, []
    for step, value in points:
        if math.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        found.append((step, mean / weight if weight else math.nan))
    return found


@dataclass(frozen=True)
class _Frame:
    """What part of the plane is shown."""

    left: float
    right: float
    low: float
    high: float
    width: int
    height: int

    @staticmethod
    def around(points: Sequence[tuple[float, float]], size: tuple[int, int]) -> "_Frame":
        steps, values = [step for step, _ in points], [value for _, value in points]
        low, high = min(values), max(values)
        if high == low:
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        return _Frame(min(steps), max(max(steps), min(steps) + 1), low, high, *size)

    def x(self, step: float) -> float:
        return LEFT + (step - self.left) / (self.right - self.left) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (self.height - TOP - BOTTOM)


def _axes(svg: ElementTree.Element, frame: _Frame) -> None:
    for value in _ticks(frame.low, frame.high):
        y = f"{frame.y(value):.1f}"
        ElementTree.SubElement(
            svg, "line", {"class": "grid", "x1": f"{LEFT}", "x2": f"{frame.width - RIGHT}", "y1": y, "y2": y}
        )
        _text(svg, "text", f"{value:.4g}", x=f"{LEFT - 6}", y=y, **{"class": "value"})
    for step in _ticks(frame.left, frame.right):
        _text(svg, "text", f"{step:,.0f}", x=f"{frame.x(step):.1f}", y=f"{frame.height - 6}", **{"class": "step"})


def _draw(svg: ElementTree.Element, frame: _Frame, line: Line, number: int) -> None:
    group = ElementTree.SubElement(svg, "g", {"class": f"line line-{number}"})
    noisy = not line.is_marked and _is_noisy([value for _, value in line.points])
    for part in _unbroken(line.points):
        _polyline(group, frame, part, "raw" if noisy else "curve")
    for part in _unbroken(smoothed(line.points)) if noisy else ():
        _polyline(group, frame, part, "curve")
    for step, value in line.points if line.is_marked else ():
        if math.isfinite(value):
            place = {"cx": f"{frame.x(step):.1f}", "cy": f"{frame.y(value):.1f}", "r": "3.5"}
            _text(
                ElementTree.SubElement(group, "circle", place), "title", f"{line.name} {value:.5g} at step {step:,.0f}"
            )


def _is_noisy(values: Sequence[float]) -> bool:
    finite = [value for value in values if math.isfinite(value)]
    travelled = sum(abs(after - before) for before, after in pairwise(finite))
    return bool(finite) and travelled > NOISY * (max(finite) - min(finite))


def _polyline(group: ElementTree.Element, frame: _Frame, points: Sequence[tuple[float, float]], kind: str) -> None:
    places = " ".join(f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in points)
    ElementTree.SubElement(group, "polyline", {"class": kind, "points": places})


def _unbroken(points: Sequence[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    """Stretches of numbers; a run that was resumed goes back in step, which breaks the line too."""
    part: list[tuple[float, float]] = []
    for point, after in pairwise([*points, (-math.inf, math.nan)]):
        if math.isfinite(point[1]):
            part.append(point)
        if part and not (math.isfinite(point[1]) and after[0] > point[0]):
            yield part
            part = []


def _ticks(low: float, high: float) -> list[float]:
    """About four round values between both: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [apart * i for i in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)]


def _text(parent: ElementTree.Element, tag: str, text: str, **attributes: str) -> None:
    ElementTree.SubElement(parent, tag, attributes).text = text
