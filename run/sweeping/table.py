"""Writes the tables of a sweep after every finished run: table.md, table.tex, table.csv, table.html.

The main table has a column for each column of the sweep, followed by the published numbers if a config names any. The
details have a line for each cell: intervals, the difference to the baseline row, parameters, time.
"""

import csv
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from run.sweeping.cells import Cell
from run.sweeping.folder import duration
from utils.files import write_atomically, writing

NONE = "-"
PUBLISHED = "published †"
MIN_P = 0.001  # smaller p-values are shown as less than this
IN_LATEX = {
    "\\": "\\textbackslash ", "~": "\\textasciitilde ", "^": "\\textasciicircum ", "±": "$\\pm$",
    "-": "$-$", "†": "$^\\dagger$", **{character: f"${character}$" for character in "<>|"},
}  # fmt: skip
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #8886 }}
th:first-child, td:first-child {{ text-align: left }}
td {{ white-space: nowrap }} svg {{ max-width: 100%; height: auto }}
</style></head><body>
<h1>{title}</h1>
{parts}
</body></html>
"""


@dataclass(frozen=True)
class Text:
    """The text of a table cell; rank 1 is the best of its column, 2 the second best."""

    text: str
    rank: int = 0


@dataclass(frozen=True)
class Table:
    """A header and lines of equal length."""

    head: Sequence[str]
    lines: Sequence[Sequence[Text]]


def write_tables(folder: Path, title: str, cells: Sequence[Cell], baseline: str, figure: str = "") -> None:
    """Writes the four files into the folder of a sweep.

    Args:
        folder: folder of the sweep.
        title: title of the sweep.
        cells: by row, then column.
        baseline: the row that all others are compared with; empty for no comparison.
        figure: an SVG element for the page.

    Raises:
        UserError: a file cannot be written.
    """
    main, details, caption = main_table(cells), details_table(cells, baseline), captions(cells, baseline)
    texts = {
        "table.md": "\n".join([f"# {title}", "", *_markdown(main), "", *caption, "", *_markdown(details), ""]),
        "table.tex": _latex([main, details], title, caption),
        "table.csv": _csv(cells),
        "table.html": _page(title, main, details, caption, figure),
    }
    for name, text in texts.items():
        with writing(folder / name):
            write_atomically(folder / name, text.encode())


# --- content ----------------------------------------------------------------------------------------------


def main_table(cells: Sequence[Cell]) -> Table:
    """Returns a table for a paper: mean ± standard deviation; the best and second best of each column are marked."""
    columns = list(dict.fromkeys(cell.column for cell in cells))
    with_published = [column for column in columns if any(c.published for c in cells if c.column == column)]
    head, lines = [""], {cell.row: [Text(cell.row)] for cell in cells}
    for column in columns:
        here = [cell for cell in cells if cell.column == column]
        order = sorted({cell.mean for cell in here if cell.mean is not None}, reverse=True)
        ranks = {mean: place for place, mean in enumerate(order[:2], start=1)} if len(order) > 1 else {}
        head += [column] + ([PUBLISHED] if column in with_published else [])
        for cell in here:
            lines[cell.row].append(Text(with_deviation(cell), ranks.get(cell.mean, 0) if cell.mean is not None else 0))
            if column in with_published:
                lines[cell.row].append(Text(f"{cell.published.accuracy:.1f}" if cell.published else NONE))
    return Table(head, list(lines.values()))


def details_table(cells: Sequence[Cell], baseline: str) -> Table:
    """Returns a line for each cell with all its numbers."""
    head = ["row", "column", "seeds", "accuracy", "± episodes", "± videos"]
    head += [f"difference to {baseline}", "± videos", "p, videos", "p, seeds"] if baseline else []
    head += ["trained parameters", "time per run"]
    return Table(head, [[Text(text) for text in _details(cell, bool(baseline))] for cell in cells])


def _details(cell: Cell, has_baseline: bool) -> list[str]:
    difference, (episodes, videos) = cell.difference, cell.intervals
    texts = [cell.row, cell.column, str(len(cell.runs)), with_deviation(cell), _number(episodes), _number(videos)]
    if has_baseline and difference:
        p_values = [_p_value(difference.p_videos), _p_value(difference.p_seeds)]
        texts += [f"{difference.mean:+.2f}", _number(difference.interval_videos), *p_values]
    elif has_baseline:
        texts += [NONE] * 4
    seconds = cell.mean_seconds
    return [*texts, _number(cell.parameters, 0), NONE if seconds is None else duration(seconds)]


def captions(cells: Sequence[Cell], baseline: str) -> list[str]:
    """Returns the captions of the tables, and notes on single numbers."""
    seeds = sorted({run.seed for cell in cells for run in cell.planned})
    over = f"mean ± standard deviation over the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "of one run"
    lines = [
        f"Accuracy in %, {over}. The intervals of 95 % are over other episodes of the same videos and over other "
        "videos (docs/evaluation.md)."
    ]
    if baseline:
        lines.append(f"Differences to {baseline} are of runs with the same seed and test episodes.")
    if any(cell.published for cell in cells):
        lines.append("† Published, not measured here; the protocol may differ from that of this table.")
        sources = [[cell.published.note] if cell.published and cell.published.note else [] for cell in cells]
        lines += [f"† {note}" for note in _with_places(cells, sources)]
    return lines + _with_places(cells, [cell.notes() for cell in cells])


def _with_places(cells: Sequence[Cell], notes: Sequence[Sequence[str]]) -> list[str]:
    """Returns each distinct note after the names of its cells."""
    places: dict[str, list[str]] = {}
    for cell, cell_notes in zip(cells, notes, strict=True):
        for note in cell_notes:
            places.setdefault(note, []).append(f"{cell.row}, {cell.column}")
    return [f"{'all' if len(names) == len(cells) else '; '.join(names)}: {note}." for note, names in places.items()]


def with_deviation(cell: Cell) -> str:
    """Returns `96.1 ± 2.7`."""
    if cell.mean is None:
        return NONE
    return f"{cell.mean:.1f}" + (f" ± {cell.deviation:.1f}" if cell.deviation is not None else "")


def _number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def _p_value(value: float | None) -> str:
    return f"< {MIN_P}" if value is not None and value < MIN_P else _number(value, 3)


# --- formats ----------------------------------------------------------------------------------------------


def _markdown(table: Table) -> list[str]:
    """Returns the lines of a Markdown table; the best is bold, the second best underlined."""
    marks: dict[int, Callable[[str], str]] = {1: lambda text: f"**{text}**", 2: lambda text: f"<u>{text}</u>"}
    lines = [[_marked(place, lambda text: text.replace("|", "\\|"), marks) for place in line] for line in table.lines]
    return [f"| {' | '.join(line)} |" for line in [table.head, ["---"] * len(table.head), *lines]]


def _latex(tables: Sequence[Table], title: str, caption: Sequence[str]) -> str:
    """Returns the tables in LaTeX with booktabs; the captions are comments for the author."""
    lines = [f"% {title}", *(f"% {line}" for line in caption), "% \\usepackage{booktabs}"]
    return "\n".join([*lines, *(line for table in tables for line in _tabular(table))])


def _tabular(table: Table) -> list[str]:
    marks: dict[int, Callable[[str], str]] = {
        1: lambda text: f"\\textbf{{{text}}}",
        2: lambda text: f"\\underline{{{text}}}",
    }
    lines = [[_marked(place, _escaped, marks) for place in line] for line in table.lines]
    return [
        f"\\begin{{tabular}}{{l{'c' * (len(table.head) - 1)}}}", "\\toprule",
        f"{' & '.join(map(_escaped, table.head))} \\\\", "\\midrule",
        *(f"{' & '.join(line)} \\\\" for line in lines), "\\bottomrule", "\\end{tabular}", "",
    ]  # fmt: skip


def _escaped(text: str) -> str:
    """Escapes a text for LaTeX; the minus of a negative number is not a hyphen."""
    return re.sub(r"^-(?=\d)|[\\&%$#_{}<>|±†~^]", lambda match: IN_LATEX.get(match[0], f"\\{match[0]}"), text)


def _page(title: str, main: Table, details: Table, caption: Sequence[str], figure: str) -> str:
    """Returns a self-contained page that opens offline."""
    parts = [_html(main), *(f"<p>{html.escape(line)}</p>" for line in caption), figure, _html(details)]
    return PAGE.format(title=html.escape(title), parts="\n".join(parts))


def _html(table: Table) -> str:
    marks: dict[int, Callable[[str], str]] = {1: lambda text: f"<b>{text}</b>", 2: lambda text: f"<u>{text}</u>"}
    head = "".join(f"<th>{html.escape(text)}</th>" for text in table.head)
    lines = ["".join(f"<td>{_marked(place, html.escape, marks)}</td>" for place in line) for line in table.lines]
    return "\n".join(["<table>", f"<tr>{head}</tr>", *(f"<tr>{line}</tr>" for line in lines), "</table>"])


def _marked(place: Text, escape: Callable[[str], str], marks: dict[int, Callable[[str], str]]) -> str:
    text = escape(place.text)
    return marks[place.rank](text) if place.rank in marks else text


def _csv(cells: Sequence[Cell]) -> str:
    """Returns a line for each cell with unrounded numbers; seeds and their accuracies are separated by spaces."""
    head = [
        "row", "column", "seeds", "accuracies", "mean", "standard_deviation", "interval_95_episodes",
        "interval_95_videos", "difference", "difference_interval_95_videos", "p_videos", "p_seeds",
        "trained_parameters", "seconds", "published", "published_note", "notes",
    ]  # fmt: skip
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for cell in cells:
        difference, published = cell.difference, cell.published
        compared = (
            [difference.mean, difference.interval_videos, difference.p_videos, difference.p_seeds]
            if difference
            else [None] * 4
        )
        writer.writerow([
            cell.row, cell.column, " ".join(map(str, cell.by_seed)), " ".join(map(str, cell.by_seed.values())),
            cell.mean, cell.deviation, *cell.intervals, *compared, cell.parameters, cell.mean_seconds,
            published and published.accuracy, published and published.note, "; ".join(cell.notes()),
        ])  # fmt: skip
    return buffer.getvalue()
