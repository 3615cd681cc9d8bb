"""Every command of the README runs; where it names data that is not here, on the tiny data set instead."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from run import run as main_command
from run.run import main
from tests import raw_helpers
from tests.conftest import TinyDataset
from tests.test_commands import tiny_overrides
from tests.test_released import learner_of, released_content
from utils.checkpoint import BEST
from utils.schema import DATASETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line]
# Run elsewhere: the tests by CI itself, the first command by the test of a fresh copy below; installed by hand.
ELSEWHERE = {
    "sh run_tests.sh", "sh train_test.sh", ". .venv/bin/activate", "pip install -r requirements.txt",
    "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu",
}  # fmt: skip


MINIATURES = {
    "hmdb51": raw_helpers.hmdb, "ucf101": raw_helpers.ucf, "kinetics": raw_helpers.kinetics,
    "ssv2_full": raw_helpers.ssv2, "ssv2_small": raw_helpers.ssv2, "custom": raw_helpers.hmdb,
}  # fmt: skip


def test_the_readme_has_commands_of_each_kind():
    for name in MINIATURES:
        assert any(command.startswith(f"python run/prepare.py {name} ") for command in COMMANDS)
    for start in ("sh train_test.sh", "sh run_tests.sh", "python run/run.py", "torchrun", "tensorboard"):
        assert any(command.startswith(start) for command in COMMANDS)
    assert set(COMMANDS) >= ELSEWHERE


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to test, trained with the same small model that the commands are shrunk to."""
    directory = tmp_path_factory.mktemp("checkpoint") / "run"
    main(["--cfg", str(ROOT / "configs/clipspm/hmdb51.yaml"), *tiny_overrides(tiny_dataset, directory)])
    return directory / BEST


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ELSEWHERE])
def test_readme_command_runs(command, tiny_dataset, checkpoint, tmp_path, monkeypatch):
    words = shlex.split(command)
    small = tiny_overrides(tiny_dataset, tmp_path / "run")
    if "TEST.ONLY_TEST=true" in words:
        small.append(f"TEST.TEST_MODEL_PATH={checkpoint}")
    monkeypatch.chdir(ROOT)
    if words[:2] == ["python", "run/run.py"]:
        main([*words[2:], *small])
        assert "--profile" not in words or (tmp_path / "run" / "profile.pt.trace.json").is_file()
    elif words[:2] == ["sh", "train_test.sh"]:
        environment = {**os.environ, "PYTHON": sys.executable}
        subprocess.run([*words, *small], check=True, env=environment, capture_output=True)
    elif words[:2] == ["python", "run/convert.py"]:
        released, ours = tmp_path / "released.pt", tmp_path / "ours.pt"
        learner = learner_of("clipspm", tiny_dataset, tmp_path / "source")
        torch.save(released_content(learner, "clipspm"), released)
        subprocess.run([sys.executable, words[1], str(released), str(ours)], check=True, capture_output=True)
    elif words[:2] == ["python", "benchmarks/parity.py"]:
        subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    elif words[:2] == ["python", "benchmarks/memory.py"]:
        tiny = ["--backbone", "tiny", "--size", "32", "--frames", "2", "--out", str(tmp_path / "memory.md")]
        subprocess.run([sys.executable, *words[1:], *tiny], check=True, capture_output=True)
    elif words[:2] == ["python", "benchmarks/training.py"]:
        small = ["--method", "otam", "--backbone", "tiny", "--size", "32", "--frames", "2", "--episodes", "2"]
        finished = subprocess.run([sys.executable, *words[1:], *small], check=True, capture_output=True, text=True)
        for word in ("share", "ratio", "CHUNK", "ACTIVATION_CHECKPOINTING"):
            assert word in finished.stdout
    elif words == ["sh", "benchmarks/demo_table.sh"]:
        few = ["--rows", "OTAM", "--seeds", "1", "--train-episodes", "2", "--test-episodes", "4"]
        paths = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "table.md")]
        changes = [change for change in small if not change.startswith(("CHECKPOINT", "DEBUG"))]
        command = [sys.executable, "benchmarks/demo_table.py", *few, *paths, *changes]
        subprocess.run(command, check=True, capture_output=True)
        assert "| OTAM |" in (tmp_path / "table.md").read_text()
    elif words == ["python", "benchmarks/a2m2_parts.py"]:
        few = ["--seeds", "1", "2", "--train-episodes", "1", "--test-episodes", "2"]
        paths = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "parts.md")]
        changes = [change for change in small if not change.startswith(("CHECKPOINT", "DEBUG"))]
        subprocess.run([sys.executable, *words[1:], *few, *paths, *changes], check=True, capture_output=True)
        assert " of 2 |" in (tmp_path / "parts.md").read_text()
    elif words[0] == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]  # on a free port
        subprocess.run([*torchrun, *words[1:], *small], check=True, capture_output=True)
        assert (tmp_path / "run" / "results.json").is_file()
    elif words[0] == "tensorboard":
        assert "--logdir" in words
        subprocess.run([sys.executable, "-m", "tensorboard.main", "--version_tb"], check=True, capture_output=True)
    elif words[:2] == ["python", "run/prepare.py"] and words[2] != "demo":
        run_prepare(words[2:], tmp_path)
    elif words[:2] == ["python", "run/prepare.py"]:
        clips = ["--out", str(tmp_path / "demo"), "--train-clips", "1", "--eval-clips", "1", "--workers", "1"]
        subprocess.run([sys.executable, *words[1:], *clips], check=True, capture_output=True)
    else:
        pytest.fail(f"the test does not know how to run {command!r}")


def run_prepare(words: list[str], tmp_path: Path) -> None:
    """A command that needs downloads, on a miniature of them: the folders it names are replaced, all else stays."""
    if words[0] == "check":
        raw, split_dir = raw_helpers.hmdb(tmp_path)
        raw_helpers.prepare("hmdb51", "--videos", raw, "--split-dir", split_dir, "--out", tmp_path / "out")
        changes = [f"DATA.DATA_DIR={tmp_path / 'out/packed'}", f"DATA.SPLIT_DIR={tmp_path / 'out/splits'}"]
        small = ["TRAIN.WAY=2", "TRAIN.SHOT=1", "TRAIN.QUERY_PER_CLASS=1", "TEST.WAY=2", "TEST.SHOT=1"]
        assert "complete" in raw_helpers.prepare(*words, *changes, *small).stdout
        return
    raw, split_dir, *lists = MINIATURES[words[0]](tmp_path)
    folders = {"--videos": raw, "--lists": lists[0] if lists else None, "--out": tmp_path / "out"}
    for option, folder in folders.items():
        if option in words:
            words[words.index(option) + 1] = str(folder)
        elif folder is not None:
            words += [option, str(folder)]
    if words[0] != "custom":
        words += ["--split-dir", str(split_dir)]
    assert "complete: every expected video is there" in raw_helpers.prepare(*words).stdout
    assert (tmp_path / "out/packed/test.sqlite").is_file()


def test_the_data_section_says_how_many_videos_the_class_lists_expect():
    for name, folder in DATASETS.items():
        content = yaml.safe_load((ROOT / "splits" / folder / "classes.yaml").read_text(encoding="utf-8"))
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` | ")]
        for split in ("train", "val", "test"):
            assert f"{sum(entry['videos'] for entry in content[split]):,}" in row


def test_the_first_command_does_the_main_job_in_a_fresh_copy(tmp_path):
    """Renders the demo, trains and tests; shortened by DEBUG, since its accuracy is no matter of a unit test."""
    copy = tmp_path / "copy"
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in git.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["sh", "train_test.sh", "DEBUG=true"]
    finished = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "demo 5-way 1-shot, clipspm (tiny):" in finished.stdout
    assert (copy / "checkpoints" / "clipspm_demo" / "results.json").is_file()
    again = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "already there" in again.stdout + again.stderr
    assert "--resume" in again.stderr


def test_every_message_that_the_readme_explains_is_one_that_the_code_says():
    said = [text for name in ("run", "utils", "episodes", "models") for text in messages_in(ROOT / name)]
    section = README.partition("| message | cause | way out |")[2].partition("\n\n")[0]
    explained = re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)
    assert len(explained) > 10
    assert [message for message in explained if not any(message in text for text in said)] == []


def messages_in(folder: Path) -> list[str]:
    """Every text in the source files of a folder, with … in place of what is filled in."""
    texts = []
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[sd]", "…", node.value))
    return texts


def test_the_example_class_list_is_one_that_loads():
    (block,) = re.findall(r"```yaml\n(dataset: .*?)```", README, re.DOTALL)
    example = yaml.safe_load(block)
    shipped = yaml.safe_load((ROOT / "splits/hmdb_ARN/classes.yaml").read_text(encoding="utf-8"))
    assert example.keys() == shipped.keys()
    for split in ("train", "val", "test"):
        assert all(entry.keys() == shipped["train"][0].keys() for entry in example[split])


def test_the_example_method_trains_and_tests(tiny_dataset, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "my_module.py").write_text(block.replace('@register("meanpool")\n', ""), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / "mine.yaml"
    config.write_text("MODEL: {NAME: 'my_package.my_module:MeanPool', TEMPERATURE: 5.0}\n", encoding="utf-8")
    main(["--cfg", str(config), *tiny_overrides(tiny_dataset, tmp_path / "run")])
    assert (tmp_path / "run" / "results.json").is_file()
    assert main_command.main is main
