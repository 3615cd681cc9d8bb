"""Draws timelines: one panel per video, one row per class; the shade shows the probability of each window."""

import io
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from run.prediction_output import NONE, Answer
from run.timeline import Timeline
from utils.errors import UserError

MAX_PANELS = 20
WIDTH, ROW, FRAME, BAR = 9.0, 0.24, 0.9, 0.15  # inches: the picture, a class, around a panel's rows, the colour bar
LONGEST_NAME = 60  # characters
CHOSEN, REJECTED = "#d55e00", "#767676"  # Okabe and Ito's vermilion, distinct from blue for all colour vision; grey


def matplotlib_pyplot() -> ModuleType:
    """Imports matplotlib, only for files.

    Raises:
        UserError: matplotlib is not installed.
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


def raise_if_too_many(videos: int) -> None:
    """Raises UserError for more than MAX_PANELS videos; call it before the videos are classified."""
    if videos > MAX_PANELS:
        raise UserError(f"--picture shows {MAX_PANELS} videos at most, found {videos}: use fewer queries")


def draw(timelines: Mapping[str, Timeline], answers: Sequence[Answer], suffix: str) -> bytes:
    """Returns the picture of at most MAX_PANELS timelines.

    Args:
        timelines: name of a video -> its timeline.
        answers: answers to all their windows, in order.
        suffix: format of the picture: png, svg or pdf.
    """
    plt = matplotlib_pyplot()
    classes = len(next(iter(timelines.values())).prediction.classes) + 1
    height = len(timelines) * (ROW * classes + FRAME) + 0.4
    # A dollar sign in a file name must not start a formula.
    with plt.rc_context({"text.parse_math": False, "font.size": 9, "savefig.facecolor": "white"}):
        figure, panels = plt.subplots(
            len(timelines), 1, squeeze=False, figsize=(WIDTH, height), layout="constrained", sharex=False
        )
        for panel, (name, timeline) in zip(panels[:, 0], timelines.items(), strict=True):
            shades = _draw_panel(panel, name, timeline, [answer.answer for answer in answers if answer.query == name])
        figure.colorbar(shades, ax=panels[:, 0].tolist(), label="probability", pad=0.01, aspect=height / BAR)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=150)
        plt.close(figure)
    return buffer.getvalue()


def _draw_panel(panel: Any, name: str, timeline: Timeline, answers: Sequence[str]) -> Any:
    """Draws the rows of one video, with the answer to each window as a bar; returns the meaning of the colours."""
    classes, edges = timeline.prediction.classes, timeline.edges()
    labels = [*classes, NONE] if NONE in answers else list(classes)
    probabilities = timeline.prediction.probabilities.numpy().T
    borders = [row - 0.5 for row in range(len(classes) + 1)]
    shades = panel.pcolormesh(edges, borders, probabilities, cmap="Blues", vmin=0, vmax=1)
    for window, answer in enumerate(answers):
        row = labels.index(answer) if answer != NONE else len(classes)
        colour = REJECTED if answer == NONE else CHOSEN
        panel.plot(edges[window : window + 2], [row, row], color=colour, linewidth=3, solid_capstyle="butt")
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.set_yticks(range(len(labels)), [shortened(label) for label in labels])
    panel.set_xlim(edges[0], edges[-1])
    panel.set_xlabel("seconds" if timeline.unit == "s" else "frames")
    panel.set_title(f"{shortened(name)}   (line: answer)", loc="left", fontsize=9)
    return shades


def shortened(name: str) -> str:
    """Returns the end of a long name; bytes that are not UTF-8 are escaped, since fonts cannot show them."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= LONGEST_NAME else f"...{text[-LONGEST_NAME:]}"
