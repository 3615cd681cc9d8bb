"""Tables, differences and the figure of a sweep, from results that a stand-in wrote."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from run.compare import main as compare
from run.requirements import missing
from run.sweep import main
from run.sweeping.cells import Results
from run.sweeping.figure import draw
from run.sweeping.folder import SweepFolder
from run.sweeping.plan import plan
from run.sweeping.sweep_file import load_sweep_file
from run.sweeping.table import _p_value
from tests.helpers.shipped import ROOT
from tests.helpers.sweeps import csv_rows, runs_of, write
from tests.helpers.toy_runs import toy_run


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


# Right answers of 8 in each run: a row is ahead, one behind; of two seeds with different test episodes.
RIGHT = {
    "OTAM": ([[1, 1], [1, 0], [0, 0], [1, 0]], [[1, 1], [1, 0], [1, 0], [1, 0]]),
    "mean": ([[1, 0], [0, 0], [0, 0], [1, 0]], [[1, 1], [0, 0], [0, 0], [1, 0]]),
    "A_b & 100 % | <c>": ([[1, 1], [1, 1], [1, 1], [0, 1]], [[1, 1], [1, 1], [1, 0], [1, 1]]),
}


def table_of(tmp_path: Path, same_episodes: bool = True, **changes: Any) -> Path:
    """Makes the results of RIGHT, writes their tables with --only-table, and returns the folder."""
    rows = [{"NAME": name, "SET": f"SOLVER.LR=1e-{n}"} for n, name in enumerate(RIGHT, start=3)]
    content = {"ROWS": rows, "COLUMNS": None, **changes}
    for run in runs_of(tmp_path, **content):
        if run.row in RIGHT and run.seed < 3:
            episodes = {} if same_episodes else {"episode_list_sha256": str(run.seed) * 64, "seed": run.seed}
            toy_run(run.directory, RIGHT[run.row][run.seed - 1], run.seed, **episodes)
    main([str(write(tmp_path, **content)), "--out", str(tmp_path / "out"), "--only-table"])
    return tmp_path / "out"


def test_tables_contain_means_deviations_and_marks_in_every_format(tmp_path):
    folder = table_of(tmp_path)
    rows = csv_rows(folder)
    assert float(rows["OTAM"]["mean"]) == 56.25
    assert float(rows["OTAM"]["standard_deviation"]) == pytest.approx(np.std([50, 62.5], ddof=1))
    markdown, latex = (folder / "table.md").read_text(), (folder / "table.tex").read_text()
    assert "| OTAM | <u>56.2 ± 8.8</u> |" in markdown
    assert "| A_b & 100 % \\| <c> | **87.5 ± 0.0** |" in markdown
    assert "OTAM & \\underline{56.2 $\\pm$ 8.8} \\\\" in latex
    assert "A\\_b \\& 100 \\% $|$ $<$c$>$ & \\textbf{87.5" in latex
    assert latex.count("\\begin{tabular}") == 2  # the details too
    assert "& $-$25.00 &" in latex  # the difference of mean
    assert all(word in latex for word in ("\\toprule", "\\midrule", "\\bottomrule"))
    page = (folder / "table.html").read_text()
    assert html.escape("A_b & 100 % | <c>") in page
    assert "<b>87.5 ± 0.0</b>" in page
    assert not re.search(r"(src|href)=\"(?!#)", page)  # opens offline
    if not missing([str(ROOT / "requirements-report.txt")]):
        svg = (folder / "figure.svg").read_text()
        assert "<svg" in page
        assert all(name in svg for name in ("OTAM", "mean", "accuracy (%)"))
        assert (folder / "figure.png").stat().st_size > 1000


def test_differences_equal_those_of_run_compare(tmp_path):
    folder = table_of(tmp_path)
    sides = [sorted(map(str, (folder / "runs").glob(f"{name}-*"))) for name in ("otam", "mean")]
    compare([*sides[0], "vs", *sides[1], "--json", str(tmp_path / "comparison.json")])
    [expected] = json.loads((tmp_path / "comparison.json").read_text())["comparisons"]
    found = csv_rows(folder)["mean"]
    assert float(found["difference"]) == pytest.approx(expected["difference"])
    assert float(found["p_seeds"]) == expected["over_seeds"]["p_value"] == 0.5
    assert float(found["p_videos"]) == pytest.approx(expected["over_videos"]["p_value"])
    assert float(found["difference_interval_95_videos"]) == pytest.approx(expected["over_videos"]["interval_95"])


def test_details_are_the_rounded_numbers_of_the_csv_file(tmp_path):
    folder = table_of(tmp_path)
    lines = (folder / "table.md").read_text().splitlines()
    [found] = [line for line in lines if line.startswith("| mean | accuracy |")]
    row = csv_rows(folder)["mean"]
    formats = {
        "mean": ".1f", "standard_deviation": ".1f", "interval_95_episodes": ".2f", "interval_95_videos": ".2f",
        "difference": "+.2f", "difference_interval_95_videos": ".2f", "p_videos": ".3f", "p_seeds": ".3f",
    }  # fmt: skip
    mean, deviation, *others = [format(float(row[name]), digits) for name, digits in formats.items()]
    assert [cell.strip() for cell in found.split("|")[3:11]] == ["2", f"{mean} ± {deviation}", *others]


def test_a_small_p_value_is_not_rounded_to_zero():
    assert [_p_value(value) for value in (None, 0.0009, 0.0041, 0.25)] == ["-", "< 0.001", "0.004", "0.250"]


def test_test_episodes_of_all_seeds_are_pooled(tmp_path):
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
    same, other = (csv_rows(table_of(tmp_path / name, name == "same"))["OTAM"] for name in ("same", "other"))
    assert same["mean"] == other["mean"]
    by_episode = np.concatenate([100 * np.array(right, float).mean(axis=1) for right in RIGHT["OTAM"]])
    expected = 1.959964 * by_episode.std(ddof=1) / np.sqrt(8)
    assert float(other["interval_95_episodes"]) == pytest.approx(expected, rel=1e-5)
    assert float(same["interval_95_episodes"]) > float(other["interval_95_episodes"])


def test_rows_with_other_test_episodes_have_no_difference(tmp_path):
    folder = table_of(tmp_path, SEEDS=[1, 2, 3])
    assert csv_rows(folder)["mean"]["difference"]
    for run in plan(load_sweep_file(tmp_path / "sweep.yaml"), folder):
        if run.seed == 3 and run.row in ("OTAM", "mean"):
            toy_run(run.directory, RIGHT["mean"][0], 3, episode_list_sha256=run.row * 16)
    main([str(tmp_path / "sweep.yaml"), "--out", str(folder), "--only-table"])
    assert csv_rows(folder)["mean"]["difference"] == ""


def test_a_row_whose_settings_change_no_score_is_noted(tmp_path):
    """Equal accuracies of different answers are no reason for the note, and neither is one equal seed of two."""
    rows = [{"NAME": name, "SET": f"SOLVER.LR=1e-{n}"} for n, name in enumerate(("OTAM", "no effect", "one seed"), 3)]
    right = {"OTAM": RIGHT["OTAM"], "no effect": RIGHT["OTAM"], "one seed": (RIGHT["OTAM"][0], RIGHT["OTAM"][1][::-1])}
    content = {"ROWS": rows, "COLUMNS": None, "SEEDS": [1, 2]}
    for run in runs_of(tmp_path, **content):
        toy_run(run.directory, right[run.row][run.seed - 1], run.seed)
    main([str(write(tmp_path, **content)), "--out", str(tmp_path / "out"), "--only-table"])
    found = csv_rows(tmp_path / "out")
    assert "no effect" in found["no effect"]["notes"]
    assert float(found["one seed"]["difference"]) == 0
    assert [found[name]["notes"] for name in ("OTAM", "one seed")] == ["", ""]


def test_the_figure_shows_means_with_intervals_over_videos(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes", reason="pip install -r requirements-report.txt")
    folder, drawn, errorbar = table_of(tmp_path), [], axes.Axes.errorbar
    note = lambda self, x, y, xerr, **look: drawn.append((x[0], xerr)) or errorbar(self, x, y, xerr=xerr, **look)  # noqa: E731
    monkeypatch.setattr(axes.Axes, "errorbar", note)
    cells = Results(plan(load_sweep_file(tmp_path / "sweep.yaml"), folder), SweepFolder(folder), "OTAM").cells()
    draw(folder, cells, "OTAM")
    rows = csv_rows(folder).values()
    assert drawn == [
        (pytest.approx(float(row["mean"])), pytest.approx(float(row["interval_95_videos"])))
        for row in rows
        if row["mean"]
    ]


def test_tables_contain_notes_on_caveats(tmp_path):
    folder = table_of(tmp_path, SEEDS=[1, 2, 3])
    sweep = tmp_path / "sweep.yaml"
    [run] = [run for run in plan(load_sweep_file(sweep), folder) if (run.row, run.seed) == ("mean", 3)]
    toy_run(run.directory, RIGHT["mean"][0], 3, checkpoint_selected_on="test")
    main([str(sweep), "--out", str(folder), "--only-table"])
    notes = (folder / "table.md").read_text()
    assert "OTAM, accuracy; A_b & 100 % | <c>, accuracy: 2 of 3 seeds." in notes
    assert "mean, accuracy: checkpoint selected on the test classes." in notes
