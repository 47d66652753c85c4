"""Small pieces of SVG: elements with escaped content, axes, and labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

CHARACTER_WIDTH = 0.6
"""Mean width of a character, as a share of the font size."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in the drawing."""

    left: float
    top: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Return the common area of two boxes."""
        wide = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        high = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        return max(wide, 0.0) * max(high, 0.0)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """Return the point of the box that is nearest to a place."""
        return (
            min(max(x, self.left), self.left + self.width),
            min(max(y, self.top), self.top + self.height),
        )


@dataclass(frozen=True, slots=True)
class Frame:
    """The plot area inside an SVG, with a range of values on both axes (y upwards)."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float] = (0.0, 1.0)
    y_range: tuple[float, float] = (0.0, 1.0)

    def x(self, value: float) -> float:
        """Return the horizontal place of a value, clamped to the frame."""
        low, high = self.x_range
        return self.left + self.width * _share(value, low, high)

    def y(self, value: float) -> float:
        """Return the vertical place of a value, clamped to the frame."""
        low, high = self.y_range
        return self.top + self.height * (1.0 - _share(value, low, high))


def _share(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0) if high != low else 0.5


def element(name: str, *children: str | Markup, **attributes: str | float | None) -> Markup:
    """Return `<name attributes>children</name>`; everything that is not Markup is escaped.

    Underscores in attribute names become hyphens; a trailing one is dropped (`class_`); None omits.
    """
    parts = []
    for key, value in attributes.items():
        if value is None:
            continue
        text = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
        parts.append(Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), text))
    start = Markup("<{}{}>").format(Markup(name), Markup("").join(parts))
    return start + Markup("").join(escape(child) for child in children) + Markup(f"</{name}>")


def label(text: str, x: float, y: float, *, kind: str = "tick", anchor: str = "middle") -> Markup:
    """Return a text; `kind` is its CSS class."""
    return element("text", text, x=x, y=y, class_=kind, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """Return a straight line of CSS class `kind`."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def drawing(width: float, height: float, title: str, *content: Markup, kind: str = "") -> Markup:
    """Return an SVG that scales with the page and has a title for screen readers."""
    return element(
        "svg",
        element("title", title),
        *content,
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        aria_label=title,
        class_=kind or None,
    )


def percent_axes(frame: Frame, *, x_title: str, y_title: str = "", flip_y: bool = False) -> Markup:
    """Return grid, ticks and titles for shares from 0 to 100 %."""
    parts: list[Markup] = []
    bottom = frame.top + frame.height
    for step in range(0, 101, 25):
        x = frame.left + frame.width * step / 100
        parts.append(line(x, frame.top, x, bottom, "grid"))
        parts.append(label(f"{step}", x, bottom + 17))
        if y_title:
            y = bottom - frame.height * step / 100
            parts.append(line(frame.left, y, frame.left + frame.width, y, "grid"))
            shown = 100 - step if flip_y else step
            parts.append(label(f"{shown}", frame.left - 11, y + 4.5, anchor="end"))
    parts.append(label(x_title, frame.left + frame.width / 2, bottom + 38, kind="axis"))
    if y_title:
        x, y = 15.0, frame.top + frame.height / 2
        parts.append(
            element(
                "text",
                y_title,
                class_="axis",
                text_anchor="middle",
                transform=f"translate({x:.1f} {y:.1f}) rotate(-90)",
            )
        )
    return Markup("").join(parts)


def marker(role: str, x: float, y: float, size: float = 6.5) -> Markup:
    """Return a marker whose shape tells the role: diamond original, square control, else a disc."""
    if role == "original":
        s = size * 1.75
        points = f"{x:.1f},{y - s:.1f} {x + s:.1f},{y:.1f} {x:.1f},{y + s:.1f} {x - s:.1f},{y:.1f}"
        return element("polygon", points=points, class_="mark")
    if role == "control":
        side = size * 2.1
        return element(
            "rect", x=x - side / 2, y=y - side / 2, width=side, height=side, class_="mark hollow"
        )
    return element("circle", cx=x, cy=y, r=size, class_="mark")


def place_labels(
    places: Sequence[tuple[float, float]],
    texts: Sequence[str],
    frame: Frame,
    *,
    font: float = 14.0,
    lines: Iterable[Box] = (),
) -> list[Box]:
    """Return a box for each label, near its point, chosen greedily so that labels do not overlap.

    `lines` are thin boxes (error bars) that a label had better not cover.
    """
    marks = [Box(x - 9, y - 9, 18, 18) for x, y in places]
    bars = list(lines)
    taken: list[Box] = []
    for (x, y), text in zip(places, texts, strict=True):
        width, height = len(text) * font * CHARACTER_WIDTH + 12, font * 1.25
        best: tuple[float, Box] | None = None
        for radius in (14, 26, 40, 56, 74, 94, 116, 140):
            for turn in range(16):
                angle = math.pi * turn / 8
                dx, dy = math.cos(angle), math.sin(angle)
                left = x + radius * dx - width * (1 - dx) / 2
                top = y + radius * dy - height * (1 - dy) / 2
                box = Box(left, top, width, height)
                cost = radius * 1.5 + _outside(box, frame)
                cost += 60 * sum(box.overlap(other) for other in taken)
                cost += 8 * sum(box.overlap(other) for other in marks)
                cost += 0.8 * sum(box.overlap(other) for other in bars)
                if radius > 14:
                    cost += 25 * _crossed(box, (x, y), places)
                if best is None or cost < best[0]:
                    best = (cost, box)
        if best is not None:
            taken.append(best[1])
    return taken


def _crossed(box: Box, start: tuple[float, float], places: Sequence[tuple[float, float]]) -> int:
    """Return how many other points a line from `start` to the box would run over."""
    end = box.nearest(*start)
    count = 0
    for place in places:
        if place == start:
            continue
        steps = (
            math.dist(
                place, (start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t)
            )
            for t in (0.35, 0.5, 0.65, 0.8, 1.0)
        )
        count += min(steps) < 8
    return count


def _outside(box: Box, frame: Frame) -> float:
    over = max(frame.left + 2 - box.left, 0.0)
    over += max(box.left + box.width - frame.left - frame.width + 2, 0.0)
    over += max(frame.top + 2 - box.top, 0.0)
    over += max(box.top + box.height - frame.top - frame.height + 2, 0.0)
    return over * 100
