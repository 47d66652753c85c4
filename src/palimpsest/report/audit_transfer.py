"""The transfer matrix as a drawing: what prompts fitted on one method change in every model."""

from __future__ import annotations

from markupsafe import Markup

from palimpsest.audit.record import TransferCell, TransferMatrix, TransferRow, percent
from palimpsest.report import svg, words
from palimpsest.report.audit_plots import rate_text

WIDE, HIGH, LEFT, TOP = 110.0, 46.0, 150.0, 40.0


def transfer_map(matrix: TransferMatrix) -> Markup:
    """Return the change in accuracy, fitted on (down) by asked (across); hover says the rest."""
    columns = list(dict.fromkeys(column_of(c) for row in matrix.rows for c in row.cells))
    columns.sort(key=lambda name: name == OTHER_SEEDS)
    parts = [
        svg.label(words.shortened(name, 14), LEFT + WIDE * (i + 0.5), TOP - 10, kind="name")
        for i, name in enumerate(columns)
    ]
    for down, row in enumerate(matrix.rows):
        y = TOP + HIGH * down
        name = words.shortened(row.fitted_on, 18)
        parts.append(svg.label(name, LEFT - 8, y + HIGH / 2 + 4, kind="name", anchor="end"))
        if row.reason:
            said = words.shortened(row.reason, 60)
            parts.append(svg.label(said, LEFT + 8, y + HIGH / 2 + 4, anchor="start"))
        for cell in row.cells:
            parts.append(_cell(cell, row, LEFT + WIDE * columns.index(column_of(cell)), y))
    return svg.drawing(
        LEFT + WIDE * max(len(columns), 1) + 10,
        TOP + HIGH * len(matrix.rows) + 8,
        f"{matrix.attack}, {matrix.channel}: prompts fitted on one method (down), models asked (across)",
        *parts,
        kind="heat",
    )


OTHER_SEEDS = "other seeds"


def column_of(cell: TransferCell) -> str:
    """Return the name of a cell's column."""
    return OTHER_SEEDS if cell.kind == "other seeds" else cell.column


def _cell(cell: TransferCell, row: TransferRow, x: float, y: float) -> Markup:
    tip = svg.element("title", cell_text(cell, row))
    if cell.change is None or cell.rate.value is None or cell.plain.value is None:
        return svg.element("g", tip + svg.label("-", x + WIDE / 2, y + HIGH / 2 + 4))
    change = cell.change.value
    box = svg.element(
        "rect",
        x=x + 1,
        y=y + 1,
        width=WIDE - 2,
        height=HIGH - 2,
        class_="heat-cell" + (" chosen" if cell.kind == "own" else ""),
        fill_opacity=f"{0.04 + 0.84 * max(change, 0.0):.2f}",
    )
    number = svg.label(f"{100 * change:+.0f}", x + WIDE / 2, y + 20, kind="heat-text")
    from_to = f"{100 * cell.plain.value:.0f} to {100 * cell.rate.value:.0f}"
    return svg.element("g", tip + box + number + svg.label(from_to, x + WIDE / 2, y + 37))


def cell_text(cell: TransferCell, row: TransferRow) -> str:
    """Return everything that a cell says, in one line."""
    said = [
        f"fitted on {row.fitted_on}, asked {cell.column} ({cell.kind}, {cell.pairs} pair(s))",
        f"with the prompts {rate_text(cell.rate)}",
        f"without {rate_text(cell.plain)}",
        f"change {percent(cell.change)}",
    ]
    if cell.above_placebo is not None:
        said.append(f"above its own placebo {percent(cell.above_placebo)}")
    if cell.recovered is not None:
        said.append(f"R {percent(cell.recovered)}")
    return "; ".join(said)
