"""The picture of timelines: one panel per video, a row for each class, the probability of each window as its shade."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from run.prediction_output import NONE, Answer
from run.timeline import Timeline
from utils.errors import UserError

MOST_PANELS = 20
WIDTH, ROW, FRAME = 9.0, 0.24, 0.9  # inches: of the picture, of a class, and around the rows of a panel
CHOSEN, REJECTED = "#d55e00", "#767676"  # vermilion of Okabe and Ito, seen beside blue with any colour vision; grey


def matplotlib_pyplot() -> ModuleType:
    """Imports matplotlib, for files alone.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "--picture needs matplotlib; install it with: pip install -r requirements-report.txt"
        ) from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def draw(timelines: Mapping[str, Timeline], answers: Sequence[Answer], suffix: str) -> bytes:
    """Returns the picture of some timelines, at most MOST_PANELS.

    Args:
        timelines: name of a video -> its timeline.
        answers: to all their windows, in order.
        suffix: of the picture's file: png, svg or pdf.
    """
    if len(timelines) > MOST_PANELS:
        raise UserError(f"--picture shows {MOST_PANELS} videos at most, these are {len(timelines)}: name fewer queries")
    plt = matplotlib_pyplot()
    classes = len(next(iter(timelines.values())).prediction.classes)
    height = len(timelines) * (ROW * classes + FRAME) + 0.4
    # Names of files are not formulas, so that a dollar in one is only a dollar.
    with plt.rc_context({"text.parse_math": False, "font.size": 9, "savefig.facecolor": "white"}):
        figure, panels = plt.subplots(
            len(timelines), 1, squeeze=False, figsize=(WIDTH, height), layout="constrained", sharex=False
        )
        for panel, (name, timeline) in zip(panels[:, 0], timelines.items(), strict=True):
            shades = _draw_panel(panel, name, timeline, [one.answer for one in answers if one.query == name])
        figure.colorbar(shades, ax=panels[:, 0].tolist(), label="probability", pad=0.01, aspect=15)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=150)
        plt.close(figure)
    return buffer.getvalue()


def _draw_panel(panel: Any, name: str, timeline: Timeline, answers: Sequence[str]) -> Any:
    """Draws the rows of one video, with the answer of each window as a bar; returns what the colours stand for."""
    classes, edges = timeline.prediction.classes, timeline.edges()
    probabilities = timeline.prediction.probabilities.numpy().T
    rows = range(len(classes) + 1)
    shades = panel.pcolormesh(edges, [row - 0.5 for row in rows], probabilities, cmap="Blues", vmin=0, vmax=1)
    for window, answer in enumerate(answers):
        best = int(probabilities[:, window].argmax())
        colour, style = (REJECTED, ":") if answer == NONE else (CHOSEN, "-")
        panel.plot(
            edges[window : window + 2], [best, best], color=colour, linestyle=style, linewidth=3, solid_capstyle="butt"
        )
    panel.set_yticks(range(len(classes)), [printable(label) for label in classes])
    panel.invert_yaxis()
    panel.set_xlabel("seconds" if timeline.unit == "s" else "frames")
    rejected = ", dotted: none of these" if NONE in answers else ""
    panel.set_title(f"{printable(name)}   (line: answer{rejected})", loc="left", fontsize=9)
    return shades


def printable(name: str) -> str:
    """A name with the bytes that are not UTF-8 escaped, as fonts have no characters for them."""
    return name.encode("utf-8", "backslashreplace").decode()


def picture_suffix(path: Path) -> str:
    """Returns png, svg or pdf, from the name of a picture. Raises UserError for another one."""
    suffix = path.suffix.lower().lstrip(".")
    if suffix not in ("png", "svg", "pdf"):
        raise UserError(f"--picture {path}: expected a name that ends with .png, .svg or .pdf")
    return suffix
