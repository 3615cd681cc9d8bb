"""EXTENDS: an experiment file that changes some values of others."""

from pathlib import Path

import pytest

from tests.helpers.shipped import ROOT
from utils.config import load_config
from utils.errors import UserError


def write(folder: Path, **files: str) -> None:
    """Writes NAME.yaml for each argument; a double underscore in a name is a folder."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_later_files_take_precedence_and_origins_name_them(tmp_path: Path):
    write(
        tmp_path,
        first="TRAIN: {SHOT: 2, WAY: 4, PRINT_FREQ: 7}\nMODEL: {HSMR: {WEIGHT: 3}}\n",
        second="TRAIN: {SHOT: 3, WAY: 3}\n",
        own__file="EXTENDS: [../first.yaml, ../second.yaml]\nTRAIN: {WAY: 2}\nMODEL: {HSMR: {ENABLED: false}}\n",
    )
    loaded = load_config(tmp_path / "own" / "file.yaml", ["TRAIN.QUERY_PER_CLASS=1"])
    train, model = loaded.config.TRAIN, loaded.config.MODEL.model_dump()
    assert (train.WAY, train.SHOT, train.PRINT_FREQ, train.QUERY_PER_CLASS) == (2, 3, 7, 1)
    assert (model["HSMR"]["WEIGHT"], model["HSMR"]["ENABLED"]) == (3, False)
    origins = {key: Path(loaded.origins[f"TRAIN.{key}"]).name for key in ("WAY", "SHOT", "PRINT_FREQ")}
    assert origins == {"WAY": "file.yaml", "SHOT": "second.yaml", "PRINT_FREQ": "first.yaml"}


def test_files_can_be_extended_repeatedly(tmp_path: Path):
    write(
        tmp_path, a="TRAIN: {SHOT: 2}\n", b="EXTENDS: a.yaml\n", c="EXTENDS: b.yaml\n", d="EXTENDS: [a.yaml, b.yaml]\n"
    )
    assert load_config(tmp_path / "c.yaml").config.TRAIN.SHOT == 2
    assert load_config(tmp_path / "d.yaml").config.TRAIN.SHOT == 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("EXTENDS: missing.yaml", ["own.yaml", "missing.yaml"]),
        ("EXTENDS: own.yaml", ["own.yaml", "extends this file in turn"]),
        ("EXTENDS: back.yaml", ["back.yaml", "extends this file in turn"]),
        ("EXTENDS: {a: 1}", ["own.yaml", "a list of files"]),
        ("EXTENDS: [1]", ["own.yaml", "a list of files"]),
        ("EXTENDS: wrong.yaml", ["wrong.yaml", "TRAIN.SHOTS", "TRAIN.SHOT"]),
        ("TRAIN: {EXTENDS: a.yaml}", ["own.yaml", "TRAIN.EXTENDS"]),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, text: str, parts: list[str]):
    write(tmp_path, own=text, back="EXTENDS: own.yaml\n", wrong="TRAIN: {SHOTS: 5}\n")
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "own.yaml")
    assert all(part in str(refused.value) for part in parts), refused.value


def test_the_words_demo_changes_data_and_weights_of_the_demo():
    plain, words = (load_config(ROOT / f"configs/clipspm/{name}.yaml").config for name in ("demo", "demo_actions"))
    assert (words.DATA.DATASET, words.MODEL.CLIP_WEIGHTS) == ("demo_actions", "demo")
    assert words.MODEL.model_dump()["TRANSFORMER"] == plain.MODEL.model_dump()["TRANSFORMER"]
