"""`run/predict.py`: the scores of a test run for a user's own clips, and clear error messages."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import fsar
from run.answers import Answers
from run.clips import find_queries, read_support
from run.command import exit_code_of
from run.main_run import Learner
from run.predict import main
from run.prediction_output import answers_of, as_text
from run.timeline_picture import MAX_PANELS
from tests.helpers.released import learner_of, released_content
from tests.helpers.shipped import SHIPPED, tiny_options
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import trained
from utils.checkpoint import BEST
from utils.config import save_config


@pytest.fixture(scope="module")
def learner(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    """Returns a finished and tested run of CLIP-SPM, 3-way 2-shot."""
    learner = trained(tiny_dataset, tmp_path_factory.mktemp("predict") / "run", "TRAIN.SHOT=2")
    learner.test()
    return learner


@pytest.fixture
def support(learner: Learner, tmp_path: Path) -> Path:
    """Returns the support videos of test episode 0 as a folder, with their texts in classes.yaml."""
    index, spec = learner.data.splits["test"], learner.data.samplers["test"].episode(0)
    root = tmp_path / "support"
    for class_id, videos in zip(spec.class_ids, spec.support, strict=True):
        folder = root / index.classes[class_id].folder
        folder.mkdir(parents=True)
        for number, video in enumerate(videos):
            (folder / f"{number}.mp4").symlink_to(index.path(video))
    lines = [f"{index.classes[class_id].folder}: {index.classes[class_id].prompt}\n" for class_id in spec.class_ids]
    (root / "classes.yaml").write_text("".join(lines), encoding="utf-8")
    return root


@pytest.fixture
def queries(learner: Learner) -> list[Path]:
    """Returns the query videos of test episode 0."""
    index = learner.data.splits["test"]
    return [index.path(video) for video in learner.data.samplers["test"].episode(0).query]


def predict(learner: Learner, support: Path, *words: str | Path) -> int:
    """Runs the command and returns its exit code."""
    command = ["--checkpoint", learner.directory.path / BEST, "--support", support, "--device", "cpu", *words]
    return exit_code_of(lambda: main([str(word) for word in command]))


def test_equal_shots_give_the_scores_of_the_test_run(learner, support, queries, tmp_path, capsys):
    assert (
        predict(learner, support, "--query", *queries, "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv") == 0
    )
    answers = Answers.load(learner.directory.path / "answers.npz")
    classes = [str(answers.classes[class_id]) for class_id in answers.class_ids[0]]
    records = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["answers"]
    scores = torch.tensor([[record["scores"][name] for name in classes] for record in records])
    expected = torch.from_numpy(answers.scores["inductive"][0])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text(encoding="utf-8"))))
    for record, row, probabilities in zip(records, rows, expected.softmax(-1).tolist(), strict=True):
        ranked = sorted(probabilities, reverse=True)
        assert record["answer"] == row["answer"] == classes[probabilities.index(ranked[0])]
        assert record["probability"] == pytest.approx(ranked[0], abs=1e-4)
        assert float(row["margin"]) == pytest.approx(ranked[0] - ranked[1], abs=1e-4)
        assert float(row[f"p({classes[0]})"]) == pytest.approx(probabilities[0], abs=1e-4)
    printed = capsys.readouterr().out
    assert all(str(query) in printed for query in queries)


def test_folders_of_images_are_clips_and_their_names_are_texts(learner, support, tiny_dataset, tmp_path):
    (support / "classes.yaml").unlink()
    frames = tiny_dataset.frames / "test_action_0"
    shutil.copytree(frames / "test_action_0_00", support / next(p.name for p in support.iterdir()) / "one clip")
    assert predict(learner, support, "--query", frames, "--json", tmp_path / "a.json") == 0
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert len(record["answers"]) == 6
    assert sorted(record["classes"].values()) == [2, 2, 3]


def test_pictures_beside_videos_do_not_make_a_folder_one_clip(queries, tiny_dataset, tmp_path):
    clips, animations, above = (tmp_path / name for name in ("clips", "animations", "above"))
    for folder in (clips, animations, above / "day 1"):
        folder.mkdir(parents=True)
    pictures = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 99)]
    for number in (1, 2):
        pictures[0].save(animations / f"{number}.gif", save_all=True, append_images=pictures[1:])
    for folder in (clips, above):
        pictures[0].save(folder / "cover.jpg")
    for folder in (clips, above / "day 1"):
        shutil.copy(queries[0], folder / "1.mp4")
    frames = tiny_dataset.frames / "test_action_0" / "test_action_0_00"
    found = find_queries([clips, animations, above, frames])
    files = [clips / "1.mp4", animations / "1.gif", animations / "2.gif", above / "day 1" / "1.mp4", frames]
    assert found == files


def test_unreadable_clips_are_reported_and_the_others_are_classified(learner, support, queries, tmp_path, capsys):
    broken, text = next(support.iterdir()) / "broken.mp4", tmp_path / "notes.txt"
    for path in (broken, text):
        path.write_text("not a video", encoding="utf-8")
    assert predict(learner, support, "--query", text, queries[0], "--json", tmp_path / "a.json") == 1
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [answer["query"] for answer in record["answers"]] == [str(queries[0])]
    assert record["unreadable"].keys() == {str(broken), str(text)}
    assert predict(learner, support, "--query", text) == 2
    assert str(text) in capsys.readouterr().err


def test_names_that_are_not_utf8_are_written_escaped(learner, support, queries, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    try:
        shutil.copy(queries[0], name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    assert predict(learner, support, "--query", name, "--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json") == 0
    assert "caf\\udce9.mp4" in (tmp_path / "a.csv").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a.json").read_bytes())["answers"][0]["query"] == name
    os.rename(next(p for p in support.iterdir() if p.is_dir()), os.fsdecode(os.fsencode(support) + b"/caf\xe9"))
    assert predict(learner, support, "--query", queries[0]) == 2


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (lambda root: shutil.rmtree(root), "--support"),
        (lambda root: [shutil.rmtree(folder) for folder in root.iterdir() if folder.is_dir()], "no class folder"),
        (lambda root: [shutil.rmtree(root / f"test_action_{i}", ignore_errors=True) for i in range(4)], "two or more"),
        (lambda root: (root / "empty").mkdir(), "empty"),
        (lambda root: (root / "classes.yaml").write_text("walk: walking\n"), "'walk'"),
        (lambda root: (root / "classes.yaml").write_text(f"{_first(root)}: 3\n"), "3"),
        (lambda root: (root / "classes.yaml").write_text("- a\n"), "classes.yaml"),
        (lambda root: [path.write_bytes(b"") for path in _replaced(root)], "no readable clip"),
    ],
    ids=["missing", "empty", "one class", "class without clips", "unknown", "number", "list", "all broken"],
)
def test_wrong_support_folders_are_reported_in_one_sentence(learner, support, queries, tmp_path, capsys, damage, fact):
    damage(support)
    assert predict(learner, support, "--query", queries[0], "--csv", tmp_path / "a.csv") == 2
    captured = capsys.readouterr()
    assert fact in captured.err
    assert captured.out == ""
    assert not (tmp_path / "a.csv").exists()


def test_a_picture_of_too_many_videos_is_refused_before_they_are_read(learner, support, queries, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-report.txt")
    monkeypatch.setattr(fsar, "load", lambda *arguments: pytest.fail("the checkpoint was read"))
    clips = [tmp_path / f"{number}.mp4" for number in range(MAX_PANELS + 1)]
    for clip in clips:
        clip.symlink_to(queries[0])
    assert predict(learner, support, "--query", *clips, "--window", "1s", "--picture", tmp_path / "a.png") == 2
    assert not (tmp_path / "a.png").exists()


def _first(root: Path) -> str:
    return next(path.name for path in sorted(root.iterdir()) if path.is_dir())


def _replaced(root: Path) -> list[Path]:
    """Deletes the links to the clips of one class and returns their paths."""
    clips = sorted((root / _first(root)).iterdir())
    for clip in clips:
        clip.unlink()
    return clips


def test_wrong_queries_and_outputs_are_refused_first(learner, support, queries, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fsar, "load", lambda *arguments: pytest.fail("the checkpoint was read"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.csv").write_text("mine")
    for words, fact in [
        (["--query", tmp_path / "empty"], "empty"),
        (["--query", tmp_path / "none.mp4", queries[0]], "none.mp4"),
        (["--query", queries[0], "--csv", tmp_path / "there.csv"], "there.csv"),
        (["--query", queries[0], "--csv", "-", "--json", "-"], "--json"),
        (["--query", queries[0], "--json", tmp_path / "there.csv" / "a" / "b.json"], "there.csv"),
    ]:
        assert predict(learner, support, *words) == 2
        assert fact in capsys.readouterr().err
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_a_released_checkpoint_predicts_with_its_config(tiny_dataset, support, queries, tmp_path):
    learner = learner_of("clipspm", tiny_dataset, tmp_path / "run")
    released, config = tmp_path / "released.pt", tmp_path / "run.yaml"
    torch.save(released_content(learner, "clipspm"), released)
    save_config(learner.config, config)
    words = ["--checkpoint", released, "--support", support, "--device", "cpu", "--query", queries[0], "--csv"]
    assert exit_code_of(lambda: main([*map(str, words), str(tmp_path / "a.csv")])) == 2
    assert exit_code_of(lambda: main([*map(str, words), str(tmp_path / "a.csv"), "--cfg", str(config)])) == 0


@pytest.mark.parametrize("name", SHIPPED)
def test_probabilities_sum_to_one_in_the_order_of_the_scores(name):
    model = fsar.build(name, image_size=32, **tiny_options(name))
    scores = torch.tensor([[-3.0, -1.0, -2.0]])
    probabilities = model.probabilities(scores)
    assert probabilities.sum().item() == pytest.approx(1)
    assert torch.equal(probabilities.argsort(), scores.argsort())
    expected = (100 * scores if name == "zeroshot" else scores).softmax(-1)
    torch.testing.assert_close(probabilities, expected)


def test_probabilities_are_not_passed_through_a_softmax_again():
    model = fsar.build("clipfsar", BACKBONE="tiny", CLIP_WEIGHTS="random", image_size=32, COMBINE=True)
    torch.testing.assert_close(model.probabilities(torch.tensor([0.3, 0.1])), torch.tensor([0.75, 0.25]))


def test_the_text_has_the_most_probable_classes_in_order():
    names = tuple("abcdefg")
    probabilities = torch.tensor([[0.05, 0.3, 0.1, 0.2, 0.02, 0.25, 0.08]])
    prediction = fsar.Prediction(names, probabilities, probabilities)
    answer, *classes, rest = as_text(answers_of(["clip"], prediction, None)[0]).splitlines()
    assert answer == "clip: b (margin 0.050)"
    assert [line.split()[0] for line in classes] == ["b", "f", "d", "c", "g"]
    assert "2 more" in rest


def test_classes_of_a_support_folder_are_in_the_order_of_their_names(tiny_dataset, tmp_path, monkeypatch):
    for name in ("jump", "clap", "wave"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "clip.mp4").symlink_to(tiny_dataset.videos / "test_action_0/test_action_0_00.mp4")
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(sorted(listed(folder), reverse=True)))
    assert list(read_support(tmp_path).clips) == ["clap", "jump", "wave"]
