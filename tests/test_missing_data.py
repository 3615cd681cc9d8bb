"""A config whose data is missing: the error names the command that prepares it."""

from pathlib import Path

import pytest

from run.data import load_splits_of
from run.run import main
from tests.helpers.shipped import CONFIGS, ROOT, SHIPPED
from utils.config import load_config
from utils.errors import UserError

COMMANDS = {
    "demo": "python run/prepare.py demo",
    "demo_actions": "python run/prepare.py demo --set actions",
    "hmdb51": "python run/prepare.py hmdb51 --videos DIR",
    "ucf101": "python run/prepare.py ucf101 --videos DIR",
    "kinetics": "python run/prepare.py kinetics --videos DIR --lists DIR",
    "ssv2_small": "python run/prepare.py ssv2_small --videos DIR --lists DIR",
    "ssv2_full": "python run/prepare.py ssv2_full --videos DIR --lists DIR",
}


def refusal(path: Path, *overrides: str) -> str:
    """Returns why the splits of a config cannot be loaded."""
    with pytest.raises(UserError) as refused:
        load_splits_of(load_config(path, overrides).config, ["train", "test"])
    return str(refused.value)


@pytest.mark.parametrize("dataset", COMMANDS)
def test_missing_data_names_the_prepare_command(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    for method in SHIPPED:
        path = ROOT / "configs" / method / f"{dataset}.yaml"
        if path not in CONFIGS:
            continue
        output = refusal(path)
        assert f"no such data folder: data/{dataset}/" in output
        assert f"`{COMMANDS[dataset]}`" in output
    with pytest.raises(UserError, match=COMMANDS[dataset]):
        main(["--cfg", str(ROOT / "configs/clipspm" / f"{dataset}.yaml"), "DEVICE.DEVICE=cpu"])
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_and_missing_lists_name_the_prepare_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "configs/clipspm/kinetics.yaml"
    packed = Path("data/kinetics/packed")
    packed.mkdir(parents=True)
    assert refusal(path).startswith("the data folder is empty: data/kinetics/packed; prepare the data with")
    (packed / "some_class").mkdir()
    lines = refusal(path).splitlines()
    assert f"`{COMMANDS['kinetics']}`" in next(line for line in lines if "trainlist03.txt is missing" in line)


def test_custom_folders_are_part_of_the_command(tmp_path):
    hmdb, out = ROOT / "configs/clipspm/hmdb51.yaml", tmp_path / "my data"
    assert f"--videos DIR --out '{out}'`" in refusal(hmdb, f"DATA.DATA_DIR={out}/packed")
    own = ("DATA.DATASET=kitchen", f"DATA.DATA_DIR={out}/packed", f"DATA.SPLIT_DIR={out}/splits")
    assert f"`python run/prepare.py custom --videos DIR --out '{out}'`" in refusal(hmdb, *own)
