"""Drawings of an audit: recoveries with their intervals, lens by layer, curves by training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from palimpsest.audit.record import AttackRow, Audit, Interval, Point, Rate, percent
from palimpsest.report import svg, words

LEAST, MOST = -0.5, 1.5
"""Range of R that is drawn."""


def forest(audit: Audit, delta: float) -> Markup:
    """Return R of every attack with its 95 % interval; lines at nothing, the margin, and everything."""
    lines: list[tuple[str, Interval | None, str, str]] = [
        (f"none, {channel}", interval, "original", "no attack")
        for channel, interval in audit.residual.items()
    ]
    lines += [
        (row.name, row.recovered, "target", row.status if row.role == "attack" else row.role)
        for row in audit.rows
    ]
    step, left, wide = 26.0, 210.0, 460.0
    frame = svg.Frame(left, 8, wide, step * max(len(lines), 1), x_range=(LEAST, MOST))
    bottom = frame.top + frame.height
    parts: list[Markup] = []
    for value, kind in ((0.0, "grid"), (delta, "guide margin"), (1.0, "grid")):
        x = frame.x(value)
        parts.append(svg.line(x, frame.top, x, bottom, kind))
        parts.append(svg.label(f"{100 * value:.0f}", x, bottom + 17))
    title = "R, % of what the original shows above the floor"
    parts.append(svg.label(title, left + wide / 2, bottom + 38, kind="axis"))
    for place, (name, at, role, said) in enumerate(lines):
        y = frame.top + step * (place + 0.5)
        shown = svg.label(words.shortened(name, 26), left - 10, y + 4.5, kind="name", anchor="end")
        if at is None:
            shown += svg.label(said, left + 8, y + 4.5, kind="tick", anchor="start")
        else:
            shown += svg.line(frame.x(at.low), y, frame.x(at.high), y, "error")
            shown += svg.marker(role, frame.x(at.value), y, 5.0)
        kind = "m1" if said == "recovers" else "m-control" if role == "original" else "m0"
        tip = svg.element("title", f"{name}: {percent(at)}; {said}")
        parts.append(svg.element("g", tip + shown, class_=f"point {kind}"))
    return svg.drawing(
        left + wide + 20,
        bottom + 48,
        f"{audit.label}: recovery under every attack",
        *parts,
        kind="forest",
    )


def heat_map(row: AttackRow, channel: str) -> Markup:
    """Return accuracy by layer (across) and read-out (down) of a lens or probe, the target's arm."""
    cells: dict[tuple[str, int], Point] = {}
    for point in row.points:
        if point.channel == channel and _is_layer(point.setting):
            rest = {k: v for k, v in point.setting.items() if k != "layer"}
            name = ", ".join(str(v) for v in rest.values()) or "layer"
            cells[name, int(point.setting["layer"])] = point
    names = list(dict.fromkeys(name for name, _ in cells))
    layers = sorted({layer for _, layer in cells})
    size, left, top = 46.0, 130.0, 26.0
    parts = [svg.label(str(layer), left + size * (i + 0.5), 16) for i, layer in enumerate(layers)]
    for down, name in enumerate(names):
        y = top + size * 0.7 * down
        parts.append(
            svg.label(words.shortened(name, 16), left - 8, y + 20, kind="name", anchor="end")
        )
        for across, layer in enumerate(layers):
            found = cells.get((name, layer))
            if found is not None:
                parts.append(_cell(found, left + size * across, y, size))
    height = top + size * 0.7 * len(names) + 8
    title = f"{row.name}, {channel}: accuracy of the unlearned model by layer"
    return svg.drawing(left + size * len(layers) + 10, height, title, *parts, kind="heat")


def _cell(point: Point, x: float, y: float, size: float) -> Markup:
    rate = point.rates["target"]
    said = "; ".join(f"{arm} {rate_text(r)}" for arm, r in point.rates.items())
    tip = svg.element("title", said)
    if rate.value is None:
        return svg.element("g", tip + svg.label("-", x + size / 2, y + 20))
    box = svg.element(
        "rect",
        x=x + 1,
        y=y + 1,
        width=size - 2,
        height=size * 0.7 - 2,
        class_="heat-cell" + (" chosen" if point.is_chosen else ""),
        fill_opacity=f"{0.08 + 0.8 * rate.value:.2f}",
    )
    number = svg.label(f"{100 * rate.value:.0f}", x + size / 2, y + 21, kind="heat-text")
    return svg.element("g", tip + box + number)


def curves(row: AttackRow, channel: str) -> list[tuple[str, Markup]]:
    """Return a panel per setting but the step: accuracy of all arms by training step."""
    series: dict[str, list[Point]] = {}
    for point in row.points:
        if point.channel == channel and "step" in point.setting:
            rest = {k: v for k, v in point.setting.items() if k != "step"}
            series.setdefault(", ".join(f"{k} {v}" for k, v in rest.items()), []).append(point)
    return [(name, _curve(name, points)) for name, points in series.items() if len(points) > 1]


def _curve(name: str, points: Sequence[Point]) -> Markup:
    points = sorted(points, key=lambda p: float(p.setting["step"]))
    steps = [float(p.setting["step"]) for p in points]
    frame = svg.Frame(48, 12, 250, 120, x_range=(steps[0], steps[-1]))
    parts: list[Markup] = []
    for share in (0.0, 0.5, 1.0):
        parts.append(svg.line(48, frame.y(share), 298, frame.y(share), "grid"))
        parts.append(svg.label(f"{100 * share:.0f}", 42, frame.y(share) + 4.5, anchor="end"))
    for step in dict.fromkeys((steps[0], steps[-1])):
        parts.append(svg.label(f"{step:g}", frame.x(step), 150))
    arms = list(dict.fromkeys(arm for p in points for arm in p.rates))
    for arm in arms:
        values = [p.rates[arm].value if arm in p.rates else None for p in points]
        parts.append(_line(arm, steps, values, frame, _kind(arm)))
    for seed in range(len(points[0].seeds) if len(points[0].seeds) > 1 else 0):
        values = [p.seeds[seed] for p in points]
        parts.append(_line(f"seed {seed}", steps, values, frame, f"{_kind('target')} seed"))
    return svg.drawing(310, 156, f"accuracy by step: {name}", *parts, kind="loss")


def _line(
    name: str, steps: Sequence[float], values: Sequence[float | None], frame: svg.Frame, kind: str
) -> Markup:
    known = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
    path = "".join(
        f"{'L' if i else 'M'}{frame.x(s):.1f} {frame.y(v):.1f}" for i, (s, v) in enumerate(known)
    )
    tip = svg.element("title", name)
    return svg.element("path", tip, d=path, class_=f"curve {kind}")


def _kind(arm: str) -> str:
    if arm.startswith("placebo"):
        return "m4"
    return {"target": "m1", "original": "m-original"}.get(arm, "m-control")


def rate_text(rate: Rate) -> str:
    """Return an accuracy in percent with interval and n; what is unscored is named."""
    tail = f", {rate.unscored} unscored" if rate.unscored else ""
    if rate.value is None or rate.low is None or rate.high is None:
        return f"unscored{tail}"
    return f"{100 * rate.value:.0f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}] n={rate.n}{tail}"


def has_layers(row: AttackRow) -> bool:
    """Return whether an attack's views are layers of the model."""
    return len({p.setting["layer"] for p in row.points if _is_layer(p.setting)}) > 1


def _is_layer(setting: Mapping[str, object]) -> bool:
    layer = setting.get("layer")
    return isinstance(layer, int) and not isinstance(layer, bool)
