"""run/report.py: the numbers of a report, and the whole report of every method on a tiny data set."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.explanation import Explanation, frame_pairing
from models.matching import cosine_distances, otam
from run import report
from run.answers import Answers
from run.main_run import Learner
from run.reporting import figures, numbers, page, replayed
from run.reporting.model_sections import _tsne, chosen_videos, class_of_videos
from run.reporting.sections import classes_section, curves_section
from tests.helpers.commands import tiny_overrides
from tests.helpers.shipped import ROOT, SHIPPED, tiny_backbone
from tests.helpers.tiny_dataset import TinyDataset
from utils.config import load_config
from utils.errors import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NEEDS_PACKAGES = pytest.mark.skipif(
    bool(report.missing([str(report.REQUIREMENTS)])), reason="pip install -r requirements-report.txt"
)


def answers_of(scores: np.ndarray, labels: np.ndarray, class_ids: np.ndarray) -> Answers:
    """Returns answers with scores [E, Q, N], labels [E, Q] and class ids [E, N]; query videos are distinct."""
    classes = np.array([f"class_{c}" for c in range(class_ids.max() + 1)])
    query = np.arange(labels.size).reshape(labels.shape)
    videos = np.array([f"class/{v}" for v in range(labels.size)])
    support = np.zeros((*class_ids.shape, 1), dtype=np.int32)
    return Answers(classes, classes, videos, class_ids, support, query, labels, {"inductive": scores})


@pytest.fixture(scope="module")
def random_answers() -> Answers:
    """Returns random answers to episodes of 3 of 5 classes with 4 queries."""
    rng = np.random.default_rng(0)
    class_ids = np.stack([rng.permutation(5)[:3] for _ in range(60)]).astype(np.int32)
    return answers_of(rng.normal(size=(60, 4, 3)), rng.integers(0, 3, size=(60, 4)), class_ids)


# --- numbers ----------------------------------------------------------------------------------------------


@NEEDS_PACKAGES
def test_neighbours_are_nearest_by_cosine():
    rng, classes = np.random.default_rng(0), np.arange(40) % 4
    features = rng.normal(size=(40, 5)) * rng.lognormal(size=(40, 1))
    is_same = []
    for video, feature in enumerate(features):
        cosines = [feature @ other / np.linalg.norm(feature) / np.linalg.norm(other) for other in features]
        cosines[video] = -2
        is_same.append(classes[np.argmax(cosines)] == classes[video])
    assert numbers.same_class_neighbours(features, classes) == pytest.approx(100 * np.mean(is_same))


@NEEDS_PACKAGES
def test_the_videos_of_a_picture_are_of_all_classes_alike(random_answers):
    for limit in (5, 12, 40):
        chosen = chosen_videos(random_answers, limit)
        assert chosen == sorted(set(chosen))
        counts = np.bincount(class_of_videos(random_answers, chosen))
        assert (counts.sum(), np.ptp(counts)) == (limit, limit % 5 > 0)


@NEEDS_PACKAGES
def test_the_confusion_matrix_counts_each_answer_once(random_answers):
    found = numbers.confusion(random_answers, "inductive")
    for row, true in enumerate(found.classes):
        for column, other in enumerate(found.classes):
            given = choices = 0
            for classes, labels, scores in zip(
                random_answers.class_ids, random_answers.labels, random_answers.scores["inductive"], strict=True
            ):
                of_class = classes[labels] == true
                choices += of_class.sum() * (other in classes)
                given += (of_class & (classes[scores.argmax(axis=1)] == other)).sum()
            assert (found.given[row, column], found.choices[row, column]) == (given, choices)
    assert np.diag(found.given).sum() == random_answers.is_right("inductive").sum()


@NEEDS_PACKAGES
def test_confused_classes_are_neighbours_in_the_matrix_and_first_in_the_list():
    rng, pairs = np.random.default_rng(0), {0: 3, 3: 0, 1: 5, 5: 1, 2: 4, 4: 2}
    class_ids = np.tile(np.arange(6, dtype=np.int32), (600, 1))
    labels = rng.integers(0, 6, size=(600, 1))
    chosen = [pairs[label] if rng.random() < 0.5 else label for label in labels[:, 0].tolist()]
    found = numbers.confusion(answers_of(np.eye(6)[chosen][:, None], labels, class_ids), "inductive")
    places = {int(one): place for place, one in enumerate(found.classes)}
    assert all(abs(places[one] - places[other]) == 1 for one, other in pairs.items())
    listed = numbers.most_confused(found, 6)
    assert {(pair.true, pair.chosen) for pair in listed} == set(pairs.items())
    assert all(30 < pair.rate < 70 for pair in listed)


def test_the_interval_of_a_class_is_over_distinct_videos():
    rng = np.random.default_rng(0)
    once = (rng.random(40) < 0.7).astype(float)
    repeated = numbers.independent_answers(10 * once, np.full(40, 10))
    assert repeated == pytest.approx(40, rel=0.05)
    independent = rng.binomial(10, 0.7, size=400).astype(float)
    assert numbers.independent_answers(independent, np.full(400, 10)) == pytest.approx(4000, rel=0.15)
    assert numbers.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert numbers.wilson(1.0, 12) == pytest.approx((0.7575, 1.0), abs=1e-4)


def test_the_drawn_interval_of_a_class_ends_at_its_limits():
    rows = [numbers.ClassAccuracy("a", 30.0, 25.0, 50.0, 9, 3), numbers.ClassAccuracy("b", 80.0, 60.0, 85.0, 9, 3)]
    with figures.style():
        (axis,) = figures.class_accuracy(rows, chance=20.0).axes
    (bars,) = axis.containers[0].lines[2]
    for row, (start, end) in zip(rows, bars.get_segments(), strict=True):
        assert (start[0], end[0]) == pytest.approx((row.low, row.high))


@NEEDS_PACKAGES
@pytest.mark.parametrize("way", [3, 4])
def test_chance_depends_on_the_way_of_the_test(random_answers, way):
    with figures.style():
        section = classes_section(random_answers, {"protocol": "inductive", "way": way})
    [drawing] = section.parts
    [axis] = drawing.figure.axes
    [line] = [line for line in axis.lines if str(line.get_label()).startswith("chance")]
    assert list(line.get_xdata()) == pytest.approx([100 / way] * 2)
    assert f"{100 / way:.0f} %" in line.get_label()


def test_wrong_answers_are_sorted_by_margin_with_distinct_videos(random_answers):
    found = numbers.confusion(random_answers, "inductive")
    pairs = numbers.most_confused(found, 5)
    places = numbers.clearest_mistakes(random_answers, "inductive", pairs)
    true, chosen = random_answers.true_classes(), random_answers.chosen_classes("inductive")
    assert [(true[place], chosen[place]) for place in places] == [(pair.true, pair.chosen) for pair in pairs]
    assert len({int(random_answers.query[place]) for place in places}) == len(places)
    scores = random_answers.scores["inductive"]
    lead = scores.max(axis=-1) - np.take_along_axis(scores, random_answers.labels[..., None], axis=2)[..., 0]
    assert lead[places[0]] == lead[(true == pairs[0].true) & (chosen == pairs[0].chosen)].max()


def test_a_moving_average_is_over_the_last_values():
    assert numbers.moving_average(np.array([0.0, 2, 4, 6, 9]), 3).tolist() == pytest.approx([0, 1, 2, 4, 19 / 3])


@NEEDS_PACKAGES
def test_the_learning_curves_name_the_best_validation():
    metrics = [{"episode": episode, "val/accuracy": value} for episode, value in ((2, 50.0), (4, 61.5), (6, 40.0))]
    (drawing,) = curves_section(metrics).parts
    assert "61.50 % after 4 episodes" in drawing.caption


@pytest.mark.parametrize("options", [(0.1, True), (0.5, False)])
def test_soft_alignment_is_the_gradient_of_the_distance(options):
    generator = torch.Generator().manual_seed(0)
    query, prototypes = torch.randn(1, 1, 4, 6, generator=generator), torch.randn(1, 1, 4, 6, generator=generator)
    found = frame_pairing(query, prototypes, "otam", *options)
    assert found is not None
    distances = cosine_distances(query[0, 0], prototypes[0, 0]).double()
    for t, s in np.ndindex(4, 4):
        step = torch.zeros(4, 4, dtype=torch.float64)
        step[t, s] = 1e-5
        slope = (otam(distances + step, *options) - otam(distances - step, *options)) / 2e-5
        assert found[0, 0, 0, t, s].item() == pytest.approx(slope.item(), abs=1e-3)
    nearest = frame_pairing(query, prototypes, "bi-mhm", *options)
    assert nearest is not None
    expected = torch.zeros(4, 4)
    expected[torch.arange(4), distances.argmin(dim=1)] += 1
    expected[distances.argmin(dim=0), torch.arange(4)] += 1
    assert torch.equal(nearest[0, 0, 0], expected)
    assert frame_pairing(query, prototypes, "mean", *options) is None


@NEEDS_PACKAGES
def test_the_titles_of_an_alignment_do_not_overlap():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    frames, weights = np.zeros((8, 4, 4, 3), dtype=np.uint8), np.eye(8)
    longest = "counterclockwise turns around"[: figures.LONGEST_NAME]
    with figures.style():
        figure = figures.alignment({"pairing": (weights, weights)}, frames, (longest, frames), (longest, frames))
        FigureCanvasAgg(figure).draw()
        right, chosen = (axis.title.get_window_extent() for axis in figure.axes[:2])
    assert not right.overlaps(chosen)


# --- the complete report ----------------------------------------------------------------------------------


def run_of(data: TinyDataset, directory: Path, method: str, *overrides: str) -> dict[str, Any]:
    """Runs a method without training, or with a few episodes from `overrides`; returns its results."""
    small = [change for change in tiny_overrides(data, directory) if not change.startswith("DEBUG")]
    sizes = [
        f"MODEL.BACKBONE={tiny_backbone(method)}",
        "TRAIN.WAY=3",
        "TRAIN.TRAIN_EPISODES=0",
        "TRAIN.VAL_EPISODES=4",
        "TEST.TEST_EPISODES=12",
    ]
    learner = Learner(load_config(ROOT / f"configs/{method}/demo.yaml", [*small, *sizes, *overrides]).config)
    learner.train()
    return learner.test()


def written(directory: Path, *arguments: str) -> str:
    """Runs the command on a run directory; returns the page."""
    report.main([str(directory), "--mistakes", "1", "--videos", "9", *arguments])
    return max(directory.glob("report*.html"), key=lambda path: path.stat().st_mtime_ns).read_text(encoding="utf-8")


@NEEDS_PACKAGES
@pytest.mark.parametrize("method", SHIPPED)
def test_every_method_has_a_self_contained_report_and_figures(method, tiny_dataset, tmp_path, capsys):
    results = run_of(tiny_dataset, tmp_path, method)
    text = written(tmp_path)
    printed = capsys.readouterr().out
    assert re.findall(r"^missing: (.*)$", printed, re.MULTILINE) == [
        "no learning curves: nothing was trained, or metrics.jsonl is missing"
    ]
    assert f"{results['accuracy']:.2f}" in text
    assert results["episode_list_sha256"][:16] in text
    links = re.findall(r'(?:src|href)="([^"#][^"]*)"', text)
    assert all(link.startswith(("report/", "data:image/png")) for link in links)
    assert not re.search(r"<script|<link|@import|url\((?!#)", text)
    names = {path.stem for path in (tmp_path / "report").iterdir()}
    assert {"class_accuracy", "confusion", "features", "mistake_1_frames"} <= names
    for name in names:
        with Image.open(tmp_path / f"report/{name}.png") as image:
            assert min(image.size) > 100
        assert f'id="figure-{name}"' in text
        assert len((tmp_path / f"report/{name}.csv").read_text().splitlines()) > 1
        svg = (tmp_path / f"report/{name}.svg").read_text()
        backgrounds = [re.findall(r"fill: ([^\";]+)", drawn)[0] for drawn in (svg, page.inline(svg, name))]
        assert backgrounds == ["#ffffff", "none"]  # the page is light or dark
    assert ("mistake_1_alignment" in names) == (method not in ("team", "tsfsar", "zeroshot"))  # which pair no frames
    inside = {"clipspm": {"measure_gates", "measure_motion"}, "a2m2": {"measure_scales", "measure_candidates"}}
    assert inside.get(method, set()) <= names


@pytest.mark.parametrize(("protocol", "seen"), [("inductive", 1), ("transductive", 2)])
def test_a_query_is_explained_under_its_protocol_and_compared_with_its_scores(protocol, seen):
    """Two classes of one shot, two queries; a clip is one number, its feature too."""
    given = []
    tested = replayed.TestedModel.__new__(replayed.TestedModel)
    tested.encoder, tested.text = torch.Tensor.float, torch.zeros(2, 1)
    tested.model = SimpleNamespace(
        transductive=True,
        score=lambda *_: torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]),
        explain=lambda support, query, text: given.append(query) or Explanation(features={"query": query}),
    )
    videos = SimpleNamespace(read=lambda names: torch.tensor([int(name) for name in names]).view(-1, 1, 1, 1, 1))
    answers = SimpleNamespace(support=np.array([[[0], [1]]]), query=np.array([[2, 3]]), class_ids=np.array([[0, 1]]),
                              videos=np.array(["10", "11", "12", "13"]))  # fmt: skip
    for last_score, is_same in ((5.0, True), (4.0, False)):
        answers.scores = {protocol: np.array([[[1.0, 2.0], [3.0, last_score]]])}
        found = tested.query(videos, answers, protocol, 0, 1)
        assert found.reproduces_scores is is_same
        assert found.explanation.features["query"].flatten().tolist() == [13]
    assert {query.shape[1] for query in given} == {seen}


@NEEDS_PACKAGES
def test_missing_parts_are_named_and_the_rest_is_shown(own, tmp_path, capsys):
    run = tmp_path / "run"
    run_of(own, run, "otam", "MODEL.MATCHER=mean", "TRAIN.TRAIN_EPISODES=2", "TRAIN.PRINT_FREQ=1")
    assert "pairs no frames" in written(run)
    assert "missing:" not in capsys.readouterr().out
    moved = own.videos.rename(tmp_path / "moved")
    text = written(run)
    printed = capsys.readouterr().out
    assert str(own.videos) in printed
    assert "Confusion matrix" in text
    assert "Learning curves" in text
    assert "mistake_1_frames" not in text
    assert "mistake_1_frames" in written(run, f"DATA.DATA_DIR={moved}")
    capsys.readouterr()

    for folder in moved.iterdir():  # other content under the same names
        first, *others = sorted(folder.iterdir())
        for other in others:
            shutil.copy(first, other)
    written(run, f"DATA.DATA_DIR={moved}")
    assert "scores differ" in capsys.readouterr().out
    (run / "checkpoint_best.pt").write_bytes(b"another one")
    text = written(run, f"DATA.DATA_DIR={moved}")
    assert "checkpoint_best.pt" in capsys.readouterr().out
    assert "mistake_1_frames" in text
    assert "Features of videos" not in text
    assert sorted(path.name for path in run.glob("report*")) == sorted(
        name for n in ("", "_2", "_3", "_4", "_5") for name in (f"report{n}", f"report{n}.html")
    )


@NEEDS_PACKAGES
def test_the_report_shows_alignment_and_curves_of_the_run(tiny_dataset, tmp_path):
    run_of(tiny_dataset, tmp_path, "otam", "TRAIN.TRAIN_EPISODES=4", "TRAIN.VAL_FREQ=2", "TRAIN.PRINT_FREQ=1")
    written(tmp_path)
    with open(tmp_path / "report/mistake_1_alignment.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["role"] for row in rows} == {"right", "chosen"}
    assert len(rows) == 2 * 4 * 4
    with open(tmp_path / "report/learning_curves.csv", newline="", encoding="utf-8") as file:
        curves = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [line["val/accuracy"] for line in lines if "val/accuracy" in line]
    assert [float(row["value"]) for row in curves if row["line"] == "validation"] == pytest.approx(expected)


@NEEDS_PACKAGES
def test_the_page_opens_in_a_browser(tiny_dataset, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome on this machine")
    run_of(tiny_dataset, tmp_path, "otam")
    written(tmp_path)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    address = (tmp_path / "report.html").as_uri()
    taken = tmp_path / "page.png"
    subprocess.run(
        [*command, "--window-size=1100,3000", f"--screenshot={taken}", address],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(taken) as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 500  # text, curves and frames
    dumped = subprocess.run([*command, "--dump-dom", address], check=True, capture_output=True, text=True, timeout=120)
    drawings = len(list((tmp_path / "report").glob("*.svg")))
    assert dumped.stdout.count("<figure ") == dumped.stdout.count("</svg>") == drawings


# --- user errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_features_can_be_plotted(value):
    assert np.isfinite(_tsne(np.full((6, 5), value, dtype=np.float32))).all()  # scikit-learn may end Python


def test_missing_packages_are_reported_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "needed.txt").write_text("a-package-that-nobody-has>=1\n")
    monkeypatch.setattr(report, "REQUIREMENTS", tmp_path / "needed.txt")
    with pytest.raises(UserError, match=r"a-package-that-nobody-has.*pip install -r"):
        report.main([str(tmp_path)])


@NEEDS_PACKAGES
@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"checkpoint": "a.pt"}', '{"checkpoint": 1}'])
def test_a_directory_without_usable_results_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json"):
        report.main([str(tmp_path)])
    assert not list(tmp_path.glob("report*"))


@NEEDS_PACKAGES
def test_a_file_in_place_of_the_output_folder_is_refused_first(tmp_path):
    (tmp_path / "page.html").touch()
    with pytest.raises(UserError, match=r"--out .*page\.html is not a folder"):
        report.main([str(tmp_path), "--out", str(tmp_path / "page.html")])


def test_the_newest_results_have_the_highest_number(tmp_path):
    for name in ("results.json", "results_2.json", "results_10.json", "results_old.json"):
        (tmp_path / name).touch()
    assert report.newest_results(tmp_path).name == "results_10.json"


def test_a_failed_report_leaves_no_files(tmp_path, monkeypatch):
    (tmp_path / "report").mkdir()  # a user's folder

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_atomically", full)
    monkeypatch.setattr(page, "_rendered", lambda *_: "")
    with pytest.raises(UserError, match="No space left"):
        page.write_report(tmp_path, "title", "line", [], [])
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
