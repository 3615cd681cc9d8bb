"""Writes a report: one self-contained page, and each figure as PNG, SVG and CSV in a folder beside it."""

import csv
import io
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from run.reporting.figures import INK
from utils.files import write_atomically, write_bytes, writing

DOTS_PER_INCH = 150
BACKGROUND = "fill: #ffffff"  # of the first shape in a white SVG
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Table:
    """A table with a header; `strong` contains the numbers of the bold rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    strong: Sequence[int] = ()


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name, its caption and its numbers."""

    name: str
    figure: Any
    caption: str
    data: Table


@dataclass
class Section:
    """A part of the page; `parts` are sentences, tables and drawings in their order."""

    title: str
    parts: list[str | Table | Drawing] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """The section's name for links."""
        return re.sub(r"\W+", "-", self.title.lower())


def write_report(directory: Path, title: str, line: str, sections: Sequence[Section], notes: Sequence[str]) -> Path:
    """Writes report.html and the folder report/, or report_2.html and report_2/, ... if they exist; returns the page.

    Raises:
        UserError: a file cannot be written; the partial report is deleted.
    """
    with writing(directory):
        page = _new_page_path(directory)
        folder = page.with_suffix("")
        try:
            images = {}
            for section in sections:
                for part in section.parts:
                    if isinstance(part, Drawing):
                        images[part.name] = _write_drawing(folder, part)
            write_atomically(page, _rendered(title, line, sections, notes, folder.name, images).encode())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return page


def _new_page_path(directory: Path) -> Path:
    """Creates a new folder for a report; returns the path of its page."""
    directory.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        page = directory / ("report.html" if number == 1 else f"report_{number}.html")
        number += 1
        if page.exists():
            continue
        try:
            page.with_suffix("").mkdir()
        except FileExistsError:
            continue
        return page


def _write_drawing(folder: Path, drawing: Drawing) -> str:
    """Writes the three files of a figure; returns its SVG for the page."""
    png, svg = io.BytesIO(), io.BytesIO()
    drawing.figure.savefig(png, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    drawing.figure.savefig(svg, format="svg", facecolor="white", metadata={"Date": None})
    write_bytes(folder / f"{drawing.name}.png", png.getvalue())
    write_bytes(folder / f"{drawing.name}.svg", svg.getvalue())
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(drawing.data.header)
    writer.writerows(drawing.data.rows)
    write_bytes(folder / f"{drawing.name}.csv", text.getvalue().encode("utf-8", "backslashreplace"))
    return inline(svg.getvalue().decode(), drawing.name)


def inline(svg: str, name: str) -> str:
    """Returns an SVG for the page: without header and background, its name in its ids, INK as the text colour."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(BACKGROUND, "fill: none", 1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)


def _rendered(
    title: str, line: str, sections: Sequence[Section], notes: Sequence[str], folder: str, images: dict[str, str]
) -> str:
    """Returns the HTML of the page."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests |= {"drawing": lambda x: isinstance(x, Drawing), "table": lambda x: isinstance(x, Table)}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    marked = {name: Markup(svg) for name, svg in images.items()}
    return template.render(title=title, line=line, sections=sections, notes=notes, folder=folder, images=marked)
