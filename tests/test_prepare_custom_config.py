"""`prepare.py custom`: the config that it writes runs, for any number of classes in each split."""

from pathlib import Path

import pytest
import yaml

from episodes.preparation.custom import draw_split
from episodes.search import SPLITS
from run.command import exit_code_of
from run.prepare import main
from run.run import main as train
from tests.helpers.commands import SMALL, prepare
from tests.helpers.own_videos import FOLDERS, kitchen, two_classes_each
from tests.helpers.raw_data import all_files, render, write_lists
from utils.config import load_config
from utils.errors import UserError
from utils.yaml_text import one_line

# Shortens the run to seconds; way, shots and queries are those of the config.
FAST = [word for word in SMALL if not word.startswith("TRAIN.")]
# Shortens the preparation; processes take longer to start than these clips to read.
SHORT = ["--size", "32", "--frames", "4", "--workers", "1"]


@pytest.mark.parametrize(("classes", "videos", "way"), [(6, 2, (2, 2, 2)), (12, 3, (5, 2, 2)), (16, 7, (5, 3, 3))])
def test_the_config_of_a_custom_data_set_trains_unchanged(tmp_path, monkeypatch, classes, videos, way):
    for folder in range(classes):
        for number in range(videos):
            render(tmp_path / "raw" / f"class {folder}" / f"{folder}_{number}.mp4", frames=4)
    monkeypatch.chdir(tmp_path)
    assert main(["custom", "--videos", "raw", "--out", "data/my kitchen", *SHORT]) == 0
    path = Path("data/my kitchen/config.yaml")
    config = load_config(path).config
    assert way == (config.TRAIN.WAY, config.TRAIN.VAL_WAY, config.TEST.WAY)
    assert min(videos - 1, 4) == config.TRAIN.QUERY_PER_CLASS
    assert load_config(path, ["TRAIN.SHOT=5"]).config.test_task[1] == 5  # as for the shipped configs
    assert config.CHECKPOINT.CHECKPOINT_DIR == "checkpoints/clipspm_my_kitchen"
    assert main(["check", str(path)]) == 0
    train(["--cfg", str(path), *FAST])
    results = yaml.safe_load(Path("checkpoints/clipspm_my_kitchen/results.json").read_text())
    assert results["way"] == way[2]


TEST_ONLY = ["ratios", "folders", "lists", "empty lists"]


def share_out(root: Path, how: str, split: dict[str, list[str]]) -> list[str]:
    """Renders the classes of some splits; returns arguments of `prepare.py custom` that divide them this way."""
    for name, folders in split.items():
        for folder in folders:
            above = root / "raw" / name if how == "folders" else root / "raw"
            for number in range(3):
                render(above / folder / f"{folder}_{number}.mp4", frames=4)
    lines = {name: [f"{folder}/{folder}_{n}" for folder in folders for n in range(3)]
             for name, folders in split.items()}  # fmt: skip
    if how == "ratios":
        return ["--ratios", *(str(len(split.get(name, []))) for name in SPLITS)]
    if how == "folders":
        return []
    if how == "empty lists":
        lines |= {name: [] for name in SPLITS if name not in lines}
    return ["--lists", str(write_lists(root / "lists", lines))]


@pytest.mark.parametrize("how", TEST_ONLY)
def test_test_only_data_is_prepared_and_tested_with_the_printed_command(tmp_path, monkeypatch, capsys, how):
    words = share_out(tmp_path, how, {"test": ["open", "close"]})
    monkeypatch.chdir(tmp_path)
    assert main(["custom", "--videos", "raw", "--out", "data/x", *SHORT, *words]) == 0
    output = capsys.readouterr().out
    assert "train has no classes" in output
    assert "too small" not in output
    (command,) = [line for line in output.splitlines() if line.startswith("next: python run/run.py ")]
    assert main(["check", "data/x/config.yaml"]) == 0
    train([*command.split()[3:], *FAST])
    results = yaml.safe_load(Path("checkpoints/otam_x/results.json").read_text())
    assert (results["way"], results["checkpoint_episodes"]) == (2, 0)
    assert main(["custom", "--videos", "raw", "--out", "data/x", *SHORT, *words]) == 0


@pytest.mark.parametrize("how", TEST_ONLY)
def test_data_without_val_classes_trains_without_validation(tmp_path, monkeypatch, how):
    words = share_out(tmp_path, how, {"train": ["cut", "peel"], "test": ["open", "close"]})
    monkeypatch.chdir(tmp_path)
    assert main(["custom", "--videos", "raw", "--out", "x", *SHORT, *words]) == 0
    config = load_config("x/config.yaml").config
    assert (config.TRAIN.VAL_FREQ, config.TRAIN.WAY, config.TEST.WAY) == (0, 2, 2)
    train(["--cfg", "x/config.yaml", *FAST])
    assert yaml.safe_load(Path("checkpoints/clipspm_x/results.json").read_text())["checkpoint_episodes"] > 0


@pytest.mark.parametrize("name", ["bad\udcff", "-a 'b', \U0001f600", 'e\u0301 "x"'])
def test_folders_of_any_name_are_prepared_and_tested(tmp_path, monkeypatch, name):
    words = share_out(tmp_path, "ratios", {"test": ["open", "close"]})
    monkeypatch.chdir(tmp_path)
    out, run_directory = f"data/{name}", f"runs/{name}"
    assert main(["custom", "--videos", "raw", f"--out={out}", *SHORT, *words]) == 0
    assert Path(load_config(Path(out) / "config.yaml").config.DATA.DATA_DIR).is_dir()
    assert main(["check", f"{out}/config.yaml", f"DATA.SPLIT_DIR={one_line(f'{out}/splits')}"]) == 0
    train(["--cfg", f"{out}/config.yaml", *FAST, f"CHECKPOINT.CHECKPOINT_DIR={run_directory}"])
    assert sorted(path.name for path in Path("runs").iterdir()) == [name]
    assert {"results.json", "log.txt", "config.yaml"} <= {path.name for path in Path(run_directory).iterdir()}


def test_data_without_test_classes_or_with_one_val_class_is_refused(tmp_path, capsys):
    words = share_out(tmp_path, "folders", {"train": ["cut", "peel"], "val": ["open"]})
    output = refusal(capsys, "--videos", tmp_path / "raw", "--out", tmp_path / "out", *words)
    assert "val has 1 class, test has 0 classes" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ratios", [(0, 0, 1), (0, 1, 1), (1, 0, 1), (98, 0, 1), (0, 98, 1), (1, 0, 98)])
def test_a_split_with_ratio_0_gets_no_classes_and_the_others_two_or_more(ratios):
    for classes in range(4, 10):
        split = draw_split([f"class_{number}" for number in range(classes)], ratios, 0)
        assert len({folder for names in split.values() for folder in names}) == classes
        assert all(len(split[name]) >= 2 if ratio else not split[name]
                   for name, ratio in zip(SPLITS, ratios, strict=True))  # fmt: skip


def test_an_edited_config_is_kept_and_checked(tmp_path, capsys):
    raw, out = kitchen(tmp_path, videos=3), tmp_path / "out"
    words = ["custom", "--videos", str(raw), "--out", str(out), "--size", "32"]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert f"next: python run/run.py --cfg {out}/config.yaml" in output
    assert "too small" not in output
    edited = (out / "config.yaml").read_text().replace("QUERY_PER_CLASS: 2", "QUERY_PER_CLASS: 3")
    (out / "config.yaml").write_text(edited)
    assert main(words) == 0
    output = capsys.readouterr().out
    assert (out / "config.yaml").read_text() == edited
    lines = [line for line in output.splitlines() if line.startswith(f"too small for {out}/config.yaml: train class ")]
    assert len(lines) == 2
    assert all("has 3 videos, an episode of 1 shot and 3 queries per class needs 4" in line for line in lines)
    assert main(["check", str(out / "config.yaml")]) == 1
    assert capsys.readouterr().out.count("too small for the config: train class ") == 2


def test_a_class_with_one_video_is_reported_by_prepare_and_check(tmp_path, capsys):
    raw, out = kitchen(tmp_path), tmp_path / "out"
    (raw / "knead/knead & 1.mp4").unlink()
    assert main(["custom", "--videos", str(raw), "--out", str(out), "--size", "32"]) == 0
    assert "class 'knead' has 1 video," in capsys.readouterr().out
    assert main(["check", str(out / "config.yaml")]) == 1
    assert "class 'knead' has 1 video," in capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Returns the error message of `prepare.py custom`, one sentence."""
    assert exit_code_of(lambda: main(["custom", *map(str, words)])) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    return sentence


@pytest.mark.parametrize("classes", [3, 4, 5])
def test_fewer_than_six_class_folders_are_refused_before_anything_is_written(tmp_path, capsys, classes):
    raw = tmp_path / "raw"
    for folder in FOLDERS[:classes]:
        render(raw / folder / "1.mp4")
    output = refusal(capsys, "--videos", raw, "--out", tmp_path / "out")
    assert "val has 1 class, test has 1 class, but an episode needs 2 classes of one split" in output
    assert f"add class folders to {raw} until it has 6 or more" in output
    assert not (tmp_path / "out").exists()


def test_lists_with_one_class_in_a_split_are_refused_before_anything_is_written(tmp_path, capsys):
    raw = kitchen(tmp_path, videos=1)
    lines = two_classes_each()
    lists = write_lists(tmp_path / "lists", {**lines, "val": lines["val"][:1]})
    output = refusal(capsys, "--videos", raw, "--out", tmp_path / "out", "--lists", lists)
    assert "error: val has 1 class, but an episode needs 2 classes of one split" in output
    assert f"name videos of more classes in its list in {lists}" in output
    assert not (tmp_path / "out").exists()


def test_a_class_file_edited_to_one_class_in_a_split_is_refused(tmp_path, capsys):
    raw, file = kitchen(tmp_path, videos=1), tmp_path / "out/splits/classes.yaml"
    words = ("--videos", raw, "--out", tmp_path / "out", "--size", 32)
    prepare("custom", *words)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))  # the last class of test
    before = all_files(tmp_path / "out")
    output = refusal(capsys, *words)
    assert "error: test has 1 class, but an episode needs 2 classes of one split" in output
    assert f"move or add classes to it in {file}" in output
    assert all_files(tmp_path / "out") == before


def test_seeds_give_different_splits():
    folders = [f"class_{number}" for number in range(20)]
    assert len({str(draw_split(folders, [0.6, 0.2, 0.2], seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    "ratios", [[1.0, 0.0, 0.0], [0.5, 0.5], [-1.0, 1.0, 1.0], [float("nan")] * 3, [float("inf")] * 3]
)
def test_ratios_that_leave_a_split_empty_are_refused(ratios):
    with pytest.raises(UserError, match="--ratios"):
        draw_split(["a", "b", "c"], ratios, 0)


def test_two_classes_are_too_few():
    with pytest.raises(UserError, match="at least 6"):
        draw_split(["a", "b"], [0.6, 0.2, 0.2], 0)


@pytest.mark.parametrize("names", [["a"], ["a", "A "], ["cut_bread", "Cut Bread"], ["Straße", "STRASSE", "x"]])
def test_folders_without_a_data_set_are_reported(tmp_path, capsys, names):
    for name in names:
        render(tmp_path / "raw" / name / "1.mp4")
    words = ["custom", "--videos", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    assert exit_code_of(lambda: main(words)) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
