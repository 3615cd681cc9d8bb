"""Draws the figures of a report; each function returns a matplotlib figure that depends only on its arguments.

Text and lines have the colour INK, which the page replaces with its text colour on light and dark backgrounds. The
colours are those of Okabe and Ito and the colour map cividis, which colour-blind readers can distinguish.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from models.explanation import Measure
from run.reporting.numbers import ClassAccuracy, Confusion

INK = "#1b1f24"
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, RED = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D9C700", "#D55E00",
)  # fmt: skip
COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, "#8C8C8C")
MARKERS = "os^DvPX"
MAP = "cividis"
WIDTH = 9.0  # inches, of most figures
LONGEST_NAME = 26  # characters
MAX_TICKS, MAX_BARS = 40, 30


def style() -> AbstractContextManager[Any]:
    """Returns the matplotlib context for drawing and writing figures."""
    import matplotlib

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    settings = {
        "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
        "figure.constrained_layout.use": True, "legend.frameon": False, "svg.hashsalt": "report",
        "image.cmap": MAP, "axes.facecolor": "none", "figure.facecolor": "none", **dict.fromkeys(ink, INK),
        "text.parse_math": False,  # a dollar sign in the name of a class must not start a formula
    }  # fmt: skip
    return matplotlib.rc_context(settings)  # type: ignore[arg-type]


def curves(panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]) -> Any:
    """Draws lines over training episodes; a line with few values also gets points.

    Args:
        panels: title of a panel -> name of a line -> x and y.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _panels(len(panels), WIDTH, 3.2)
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for number, (name, (x, y)) in enumerate(lines.items()):
            style = {"color": COLOURS[number % len(COLOURS)], "lw": 1.6, "marker": "o" if len(x) <= 30 else ""}
            axis.plot(x, y, ["-", "--", "-.", ":"][number % 4], ms=3.5, label=name, **style)
        axis.set(title=title, xlabel="training episodes")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return figure


def class_accuracy(rows: Sequence[ClassAccuracy], chance: float) -> Any:
    """Draws a point with its interval for each class, the hardest class at the top."""
    figure, (axis,) = _panels(1, WIDTH * 0.8, 1.0 + 0.24 * len(rows))
    places = np.arange(len(rows))
    accuracies = np.array([row.accuracy for row in rows])
    sides = np.abs(np.array([[row.accuracy - row.low, row.high - row.accuracy] for row in rows])).T
    axis.errorbar(accuracies, places, xerr=sides, fmt="o", color=BLUE, ms=5, lw=1.8, capsize=3)
    axis.axvline(chance, color=RED, ls="--", lw=1.2, label=f"chance, {chance:.0f} %")
    axis.set_yticks(places, [short(row.name) for row in rows])
    axis.set(xlim=(0, 102), ylim=(len(rows) - 0.5, -0.5), xlabel="accuracy (%)")
    axis.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside upper right", fontsize=8)
    return figure


def confusion_matrix(confusion: Confusion, names: Sequence[str]) -> Any:
    """Draws the confusion matrix: true classes in rows, answers in columns; percentages of at least 1 are printed."""
    rates, side = confusion.rates, max(4.2, 2.3 + 0.33 * len(names))
    figure, (axis,) = _panels(1, side + 0.6, side)
    image = _matrix(axis, rates, names, names, "{:.0f}", minimum=1, limits=(0, 100))
    axis.set(xlabel="answer", ylabel="true class")
    _bar(figure, image, axis, "% of the queries that had this choice", 0.6)
    return figure


def scatter(panels: dict[str, np.ndarray], classes: np.ndarray, names: Sequence[str]) -> Any:
    """Draws videos as points, with a colour and marker for each class.

    Args:
        panels: title of a panel -> points, float [V, 2].
        classes: class of each video, int64 [V].
        names: of all classes.
    """
    figure, axes = _panels(len(panels), WIDTH, 4.6 if len(panels) < 3 else 4.2)
    present = np.unique(classes)
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for number, class_id in enumerate(present):
            own = points[classes == class_id]
            appearance = {"color": COLOURS[number % 7], "marker": MARKERS[(number // 7 + number) % 7]}
            axis.scatter(
                *own.T, s=22, alpha=0.8, lw=0.3, edgecolor="white", label=short(str(names[class_id])), **appearance
            )
        axis.set(title=title, xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, markerscale=1.3)
    return figure


def strips(rows: Sequence[tuple[str, np.ndarray, str]]) -> Any:
    """Draws rows of frames; each row is a label, frames uint8 [T, H, W, 3] and the colour of the label."""
    frames = max(len(row[1]) for row in rows)
    figure, (axis,) = _panels(1, WIDTH, 0.25 + 0.82 * WIDTH / (frames + 2.2) * len(rows))
    for number, (label, clip, colour) in enumerate(rows):
        for column, frame in enumerate(clip):
            axis.imshow(frame, extent=(column + 0.03, column + 0.97, number + 0.97, number + 0.03), zorder=2)
        axis.text(-0.1, number + 0.5, label, ha="right", va="center", fontsize=8.5, color=colour, weight="bold")
    axis.set(xlim=(-2.2, frames), ylim=(len(rows), 0), aspect="equal")
    axis.axis("off")
    return figure


def alignment(
    pairings: dict[str, tuple[np.ndarray, np.ndarray]],
    query: np.ndarray,
    right: tuple[str, np.ndarray],
    chosen: tuple[str, np.ndarray],
    roles: tuple[str, str] = ("right class", "chosen class"),
) -> Any:
    """Draws the weights of frame pairs between a query and two classes, with the frames on both axes.

    Args:
        pairings: name -> weights [T, S] with the right and with the chosen class.
        query: frames, uint8 [T, H, W, 3].
        right, chosen: name and frames of a support video of each class.
        roles: names of the two classes in the titles.
    """
    figure, axes = _panels(2 * len(pairings), WIDTH * 0.86, 4.2 * len(pairings), columns=2)
    sides = ((*right, GREEN, roles[0]), (*chosen, RED, roles[1]))
    for row, (name, matrices) in enumerate(pairings.items()):
        top = max(float(matrix.max()) for matrix in matrices)
        for axis, matrix, (label, frames, colour, role) in zip(axes[2 * row :], matrices, sides, strict=False):
            image = _framed_matrix(axis, matrix, query, frames, top)
            axis.set_title(f"{name}, {role}\n{short(label)}", color=colour)
        _bar(figure, image, axes[2 * row : 2 * row + 2], "weight of the pair", 0.7)
    return figure


def _framed_matrix(axis: Any, matrix: np.ndarray, query: np.ndarray, support: np.ndarray, top: float) -> Any:
    """Draws a matrix [T, S] with the frames of the query on its left and those of the support video below it."""
    rows, columns = matrix.shape
    image = axis.imshow(matrix, vmin=0, vmax=top, extent=(0, columns, rows, 0))
    for place, frame in enumerate(_spread(query, rows)):
        axis.imshow(frame, extent=(-1.2, -0.2, place + 0.96, place + 0.04))
    for place, frame in enumerate(_spread(support, columns)):
        axis.imshow(frame, extent=(place + 0.04, place + 0.96, rows + 1.2, rows + 0.2))
    axis.set(xlim=(-1.25, columns), ylim=(rows + 1.25, 0), xticks=[], yticks=[], aspect="equal")
    axis.set_xlabel("frames of the class")
    axis.set_ylabel("frames of the query")
    axis.spines[:].set_visible(False)
    return image


def query_measures(measures: dict[str, tuple[Measure, dict[str, np.ndarray]]], names: Sequence[str]) -> Any:
    """Draws the measures of one query.

    Args:
        measures: name -> the measure, and for each of its classes (or "query") the values [X].
        names: classes of the episode.
    """
    figure, axes = _panels(len(measures), WIDTH, 3.0, columns=min(3, len(measures)))
    for axis, (name, (measure, lines)) in zip(axes, measures.items(), strict=True):
        labels = [short(class_name) for class_name in names] if measure.axis == "class" else list(measure.parts)
        colours = (GREEN, RED) if len(lines) == 2 else (BLUE,)
        for number, ((label, values), colour) in enumerate(zip(lines.items(), colours, strict=True)):
            x, appearance = np.arange(len(values)), {"color": colour, "label": short(label)}
            if measure.axis == "frame":
                axis.plot(x + 1, values, "o-", **appearance)
            elif len(values) > MAX_BARS:
                axis.plot(x, values, lw=1, **appearance)
            else:
                axis.bar(x + (number - (len(lines) - 1) / 2) * 0.4, values, 0.8 / len(lines), **appearance)
        if measure.axis == "frame":
            axis.set_xlabel("frame")
        else:
            for border in _named_ticks(axis.set_xticks, labels):
                axis.axvline(border, color=INK, lw=0.8, ls=":")
            axis.tick_params(axis="x", rotation=90, labelsize=7)
        axis.set_title(name)
        axis.grid(axis="y", alpha=0.25)
    by_class = [axis for axis, (_, lines) in zip(axes, measures.values(), strict=True) if len(lines) > 1]
    if by_class:
        figure.legend(*by_class[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)
    return figure


def class_measures(measure: Measure, means: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Any:
    """Draws the mean of a measure over the videos of each class, float [C, X], with names on both axes."""
    wide = max(5.0, 2.6 + min(0.33 * means.shape[1], 7.0))
    figure, (axis,) = _panels(1, wide, 1.7 + 0.26 * len(rows))
    limits = float(means.min()), float(means.max())
    text = f"{{:.{_places(limits[1] - limits[0])}f}}" if means.shape[1] <= 12 else ""
    image = _matrix(axis, means, rows, columns, text, -np.inf, limits)
    axis.set_aspect("auto")
    axis.set(xlabel={"frame": "frame", "class": "class text", "part": ""}[measure.axis], ylabel="true class")
    _bar(figure, image, axis, "mean", 0.8)
    return figure


def _places(width: float) -> int:
    """Returns how many decimals, at most 3, show differences within a range to two digits."""
    return 2 if width <= 0 else int(np.clip(1 - np.floor(np.log10(width)), 0, 3))


def _matrix(
    axis: Any,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    text: str,
    minimum: float,
    limits: tuple[float, float],
) -> Any:
    """Draws a matrix with names and, from `minimum` on, numbers in its cells; lines separate groups of equal names."""
    image = axis.imshow(values, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    for border in _named_ticks(axis.set_xticks, [short(name) for name in columns]):
        axis.axvline(border, color="white", lw=1.5)
    axis.tick_params(axis="x", rotation=90)
    axis.set_yticks(range(len(rows)), [short(name) for name in rows])
    middle = sum(limits) / 2
    for (row, column), value in np.ndenumerate(values):
        if text and np.isfinite(value) and value >= minimum:
            colour = "black" if value > middle else "white"
            label = text.format(value)
            size = 7 if len(label) < 5 else 6  # five characters fill a cell
            axis.text(column, row, label, ha="center", va="center", fontsize=size, color=colour)
    axis.spines[:].set_visible(False)
    return image


def _bar(figure: Any, image: Any, axes: Any, label: str, shrink: float) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=shrink, label=label, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)


def _named_ticks(set_ticks: Any, names: Sequence[str]) -> list[float]:
    """Sets a tick for each name, or in the middle of each group of equal names, but no more than are readable.

    Returns:
        the borders between neighbouring groups, if a group has more than one name.
    """
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    ends = [*starts[1:], len(names)]
    ticks = [((start + end - 1) / 2, names[start]) for start, end in zip(starts, ends, strict=True)]
    ticks = ticks[:: -(-len(ticks) // MAX_TICKS)]
    set_ticks([place for place, _ in ticks], [name for _, name in ticks])
    return [start - 0.5 for start in starts[1:]] if len(starts) < len(names) else []


def _spread(frames: np.ndarray, number: int) -> np.ndarray:
    """Returns `number` of the frames, evenly spaced."""
    return frames[np.linspace(0, len(frames) - 1, number).round().astype(int)]


def _panels(number: int, width: float, height: float, columns: int = 0) -> tuple[Any, list[Any]]:
    """Returns a figure of a size in inches, and its axes side by side, `columns` in a row."""
    from matplotlib.figure import Figure

    columns = columns or number
    rows = -(-number // columns)
    figure = Figure(figsize=(width, height * (rows if columns < number and height < 4 else 1)))
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[number:]:
        unused.set_visible(False)
    return figure, axes[:number]


def short(name: str) -> str:
    """Shortens a class name so that it fits an axis."""
    name = name.replace("_", " ")
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
