"""Draws the figure of a sweep, figure.svg and figure.png: a dot per seed, the mean and its interval over videos."""

import io
from collections.abc import Sequence
from pathlib import Path

from run.reporting.figures import BLUE, ORANGE, style
from run.reporting.page import DOTS_PER_INCH, inline
from run.sweeping.cells import Cell
from utils.files import write_atomically, writing

NAME = "figure"


def draw(folder: Path, cells: Sequence[Cell], baseline: str) -> str:
    """Writes both files, with a panel for each column; returns an SVG element for a page, "" without results.

    Args:
        folder: folder of the sweep.
        cells: by row, then column.
        baseline: the row whose mean is drawn as a line; if empty, no line is drawn.

    Raises:
        ImportError: matplotlib is not installed.
        UserError: a file cannot be written.
    """
    from matplotlib.figure import Figure

    shown = [cell for cell in cells if cell.mean is not None]
    rows = list(dict.fromkeys(cell.row for cell in cells))
    columns = list(dict.fromkeys(cell.column for cell in shown))
    if not columns:
        return ""
    with style():
        figure = Figure(figsize=(2.2 + 3.4 * len(columns), 0.9 + 0.28 * len(rows)))
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axis, column in zip(panels, columns, strict=True):
            for cell in (cell for cell in shown if cell.column == column):
                place, seeds = rows.index(cell.row), list(cell.by_seed.values())
                axis.plot(seeds, [place] * len(seeds), "o", ms=4, color=ORANGE, zorder=3)
                axis.errorbar([cell.mean], [place], xerr=cell.intervals[1], fmt="|", ms=11, color=BLUE, capsize=3)
                if cell.row == baseline:
                    axis.axvline(cell.mean, color=BLUE, lw=0.8, ls=":")
            axis.set(title=column, xlabel="accuracy (%)", ylim=(len(rows) - 0.5, -0.5))
            axis.set_yticks(range(len(rows)), rows)
            axis.grid(axis="x", alpha=0.25)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    with writing(folder / NAME):
        write_atomically(folder / f"{NAME}.svg", svg.getvalue())
        write_atomically(folder / f"{NAME}.png", png.getvalue())
    return inline(svg.getvalue().decode(), NAME)
