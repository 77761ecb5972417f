"""Line charts as SVG, for a page without scripts. Pure; called by the report's page.

Markup is made by ElementTree, so no text can become an element; colours come from the page's style sheet.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 26
MAX_POINTS = 600
"""Of one line; where there are more, neighbours are drawn as their mean."""
SMOOTHED_FROM = 40
"""Points from which a running mean is drawn over a line."""
_TICKS = 4


@dataclass(frozen=True)
class Line:
    """One curve: (step, value), in order of step; what is no number breaks it."""

    name: str
    points: Sequence[tuple[float, float]]
    is_marked: bool = False
    """Few points, each worth a dot: evaluations."""


def chart(lines: Sequence[Line]) -> str:
    """An `<svg>` of the lines over a common pair of axes; empty where there is nothing to draw."""
    lines = [Line(line.name, thinned(line.points), line.is_marked) for line in lines]
    finite = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not finite:
        return ""
    frame = _Frame.around(finite)
    svg = ElementTree.Element("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")
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

    @staticmethod
    def around(points: Sequence[tuple[float, float]]) -> "_Frame":
        steps, values = [step for step, _ in points], [value for _, value in points]
        low, high = min(values), max(values)
        if high == low:
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        return _Frame(min(steps), max(max(steps), min(steps) + 1), low, high)

    def x(self, step: float) -> float:
        return LEFT + (step - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def _axes(svg: ElementTree.Element, frame: _Frame) -> None:
    for value in _ticks(frame.low, frame.high):
        y = f"{frame.y(value):.1f}"
        ElementTree.SubElement(
            svg, "line", {"class": "grid", "x1": f"{LEFT}", "x2": f"{WIDTH - RIGHT}", "y1": y, "y2": y}
        )
        _text(svg, "text", f"{value:.4g}", x=f"{LEFT - 6}", y=y, **{"class": "value"})
    for step in _ticks(frame.left, frame.right):
        _text(svg, "text", f"{step:,.0f}", x=f"{frame.x(step):.1f}", y=f"{HEIGHT - 8}", **{"class": "step"})


def _draw(svg: ElementTree.Element, frame: _Frame, line: Line, number: int) -> None:
    group = ElementTree.SubElement(svg, "g", {"class": f"line line-{number}"})
    noisy = not line.is_marked and len(line.points) >= SMOOTHED_FROM
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
