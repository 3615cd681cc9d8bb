"""Every benchmark runs at a small size, and its two sides agree; no test looks at a time."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import evaluation, growth, matching, memory, preparation, run_all, training
from benchmarks import literal_evaluation as literal
from benchmarks.machine import machine
from episodes.sampler import EpisodeSampler
from models.matching import otam
from tests.helpers.commands import in_process
from tests.helpers.methods import PROTOCOLS
from tests.helpers.methods import build as build_method
from tests.helpers.shipped import ROOT
from utils.errors import UserError

SMALL_EVALUATION = (
    "--backbone", "tiny", "--image-size", "32", "--frames", "3", "--videos", "60", "--episodes", "20", "--shot", "2",
    "--literal-episodes", "1", "--measure-videos", "4", "--score-episodes", "2", "--repeats", "1",
)  # fmt: skip


def run(script: str, *arguments: str | Path) -> str:
    """Runs a script, which must succeed, and returns its output."""
    finished = in_process(script, *arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_evaluation_agrees_with_the_literal_form():
    printed = run("benchmarks/evaluation.py", *SMALL_EVALUATION)
    assert f"| frames encoded | {20 * 5 * 3 * 3:,} | {60 * 3:,} |" in printed
    assert len(re.findall(r"^\| (clipspm|clipfsar|otam) \|", printed, re.MULTILINE)) == 2 * 4 + 1


def test_a2m2_by_scale_agrees_with_all_pairs():
    lines = run("benchmarks/a2m2_scales.py", "--repeats", "1").splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == ["demo", "hmdb51"]


def test_trx_scores_and_gradients_agree_with_the_literal_form():
    printed = run("benchmarks/trx.py", "--width", "16", "--tuple-width", "8", "--repeats", "1")
    assert len(re.findall(r"^\| (forward and backward|scores of [\w ]+) \|", printed, re.MULTILINE)) == 3


def test_memory_of_each_setting_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SETTINGS", {"plain": training.SETTINGS["plain"]})
    size = ("--backbone", "tiny", "--size", "32", "--way", "2", "--shot", "1", "--query", "1", "--frames", "2")
    printed = run("benchmarks/memory.py", *size, "--chunk", "1", "--out", tmp_path / "memory.md")
    assert (tmp_path / "memory.md").read_text() == printed
    names = re.findall(r"^\| (.+?) \| \d+\.\d\d \| \d+\.\d \| \d+\.\d\d \| \d+\.\d \|$", printed, re.MULTILINE)
    assert names == ["plain", *memory.CACHED]


@pytest.mark.parametrize("method", ["clipspm", "clipfsar", "otam"])
def test_both_sides_repeat_episodes_for_the_same_methods(method, monkeypatch):
    queries = []

    def scores(model, support, labels, query, class_text):
        queries.append(len(query))
        return torch.zeros(len(query), 2)

    monkeypatch.setitem(literal.METHODS, method, scores)
    model = build_method(method)
    spec = EpisodeSampler(evaluation.synthetic_index(20, 2), 2, 1, 2, seed=1).episode(0)
    for protocol in PROTOCOLS:
        queries.clear()
        side = evaluation.Literal(model, torch.zeros(2, 1), method, protocol)
        side.score(spec, lambda videos: torch.zeros(len(videos), 1))
        each = protocol == "inductive" and model.transductive
        assert queries == ([1, 1, 1, 1] if each else [4])


def test_growth_prints_its_tables_and_draws_each(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(growth, "raise_if_no_matplotlib", lambda: None)
    monkeypatch.setattr(growth, "draw", lambda panels, path: drawn.extend(panels))
    threads = torch.get_num_threads()
    growth.main(["--quick", "--repeats", "1", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert (tmp_path / "growth.md").read_text() == printed
    for name in ("shots", "ways", "frames in a clip", "episodes scored in a call", "videos", "threads"):
        assert f"| {name} | method |" in printed
    assert len(drawn) == 6
    assert all(len(values) == len(panel.positions) == 2 for panel in drawn for values in panel.lines.values())


def test_missing_matplotlib_is_reported_before_measuring(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib.*requirements-report\.txt"):
        growth.main(["--quick"])


def test_the_plot_has_every_panel_and_line(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-report.txt")
    panels = [growth.Panel("a < b", "ms", [1, 10], {"one": [1, 100], "two": [10, 10]})] * 4
    growth.draw(panels, tmp_path / "first.svg", columns=3)
    texts = [node.text for node in ElementTree.parse(tmp_path / "first.svg").iter() if node.tag.endswith("text")]
    assert texts.count("a < b") == 4
    assert (texts.count("one"), texts.count("two")) == (1, 1)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_the_literal_table_equals_the_distance_of_the_models(smoothing):
    distances = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    both = literal.fill_table(distances, smoothing) + literal.fill_table(distances.mT, smoothing)
    torch.testing.assert_close(both, otam(distances, smoothing), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [40, 100])
def test_warm_up_matrices_match_the_timed_sizes(number, monkeypatch):
    steps = []

    def noted(distances, smoothing):
        steps.append(tuple(distances.shape))
        return otam(distances, smoothing)

    def timed(side, inputs):
        steps.append("timed")
        return 1.0

    monkeypatch.setattr(matching, "otam", noted)
    monkeypatch.setattr(matching, "milliseconds", timed)
    matching.memory(torch.rand(number, matching.FRAMES, matching.FRAMES))
    (few, *sizes), second = steps[:2]
    assert second == "timed"
    assert sizes == [matching.FRAMES, matching.FRAMES]
    assert few < 32
    assert few % 16 == number % 16


@pytest.mark.parametrize(("uses_gpu", "output"), [(True, "a large GPU"), (False, "no GPU")])
def test_an_unused_gpu_is_not_reported(uses_gpu, output, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a large GPU")
    assert f" cores of which PyTorch uses {torch.get_num_threads()}, {output}, torch " in machine(uses_gpu)


def test_every_benchmark_describes_the_machine_equally():
    """Only one file reads the names of processors and the version of Python."""
    files = sorted((ROOT / "benchmarks").glob("*.py"))
    assert [path.name for path in files if re.search(r"^import platform|cpuinfo", path.read_text(), re.M)] == [
        "machine.py"
    ]


def test_preparation_prepares_every_video_with_both_presets(tmp_path, monkeypatch, capsys):
    kind = preparation.StandIn("nothing", ".avi", "mpeg4", {}, (32, 48), (9, 12))
    monkeypatch.setattr(preparation, "STAND_INS", [kind])
    monkeypatch.setattr(preparation.tempfile, "TemporaryDirectory", lambda: nullcontext(tmp_path))
    monkeypatch.setattr(preparation.subprocess, "run", lambda command, **_: run(*command[1:]))
    preparation.main(["--videos", "12"])
    head, line, row = capsys.readouterr().out.splitlines()[-3:]
    assert row.startswith("| nothing | 48 x 32, mpeg4, 9 to 12 frames | ")
    assert head.count("|") == line.count("|") == row.count("|") == 1 + 3 + 2 * 3
    for preset, frames in zip(preparation.PRESETS, [{8}, {9, 10, 11, 12}], strict=True):
        report = json.loads((tmp_path / f"many{preset}" / "report.json").read_text())["report"]
        assert sum(split["found"] for split in report["splits"].values()) == 12
        folders = [folder for folder in (tmp_path / f"many{preset}" / "frames").glob("*/*") if folder.is_dir()]
        assert {len(list(folder.glob("*.jpg"))) for folder in folders} <= frames


def test_protocol_costs_are_printed_for_training_and_scoring():
    small = ("--backbone", "tiny", "--image-size", "64", "--shots", "1", "--way", "2", "--query", "1", "--repeats", "1")
    printed = run("benchmarks/protocols.py", *small, "--methods", "clipspm", "clipmei")
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| clip")]
    assert [row[:3] for row in rows] == [
        [method, "1", part] for method in ("clipspm", "clipmei") for part in ("training", "scoring", "step")
    ]
    for method, _, part, released, _, inductive, _, ratio in rows:  # the literal side is CLIP-SPM's training step
        if method == "clipmei" or part == "scoring":
            assert released == ratio == "-"
        else:
            assert float(ratio) == pytest.approx(float(inductive) / float(released), rel=0.05)


def test_the_chosen_number_of_episodes_gives_the_same_scores():
    small = ("--backbone", "tiny", "--image-size", "64", "--methods", "otam", "--sizes", "1", "--repeats", "1")
    printed = run("benchmarks/batch_episodes.py", *small, "--episodes", "3")
    assert re.findall(r"^\| otam \| (\d) \|", printed, re.MULTILINE) == ["1", "5"]


def test_one_command_runs_the_benchmarks_and_names_those_that_fail(tmp_path, monkeypatch, capsys):
    def finished(command, **_):
        return subprocess.CompletedProcess(
            command, int("trx.py" in command[1]), f"output of {command[1]}\n", "reason\n"
        )

    monkeypatch.setattr(run_all.subprocess, "run", finished)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--out", str(tmp_path / "all.txt")])
    assert run_all.main() == 1
    printed = capsys.readouterr().out
    assert (tmp_path / "all.txt").read_text() == printed
    assert printed.count("reason") == 1
    assert "failed: trx" in printed.splitlines()[-1]
    for command in run_all.COMMANDS.values():
        assert f"output of benchmarks/{command.split()[0]}\n" in printed
        assert (ROOT / "benchmarks" / command.split()[0]).exists()


def test_both_starts_reach_the_first_step():
    printed = run("benchmarks/start_up.py", "--backbone", "tiny", "--image-size", "64", "--videos", "102")
    assert re.findall(r"^(\w+) start: [\d.]+ s", printed, re.MULTILINE) == ["first", "second"]
