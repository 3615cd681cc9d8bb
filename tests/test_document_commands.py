"""Every command of the README and of docs/ runs; where it names data that is not here, on a tiny data set instead."""

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

from episodes.demo.render import DEMO_SETS, render_clip, write_video
from run import report
from run import run as main_command
from run.calibrate import main as calibrate
from run.compare import main as compare
from run.export import main as export
from run.predict import main as predict
from run.run import main
from run.sweep import main as sweep
from tests.helpers import raw_data
from tests.helpers.commands import in_process, prepare, tiny_overrides
from tests.helpers.released import learner_of, released_content
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_dataset import TinyDataset
from utils.checkpoint import BEST
from utils.config import save_config
from utils.errors import UserError
from utils.schema import DATASETS

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCKS = [block for text in PAGES.values() for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
COMMANDS = list(dict.fromkeys(line for block in BLOCKS for line in block.splitlines() if line))
# Run by CI, by the test of a fresh copy below, or by hand when the environment is made.
ELSEWHERE = {
    "sh run_tests.sh", "sh run_tests.sh --fast", "sh train_test.sh", ". .venv/bin/activate",
    "pip install -r requirements.txt", "pip install -r requirements-report.txt",
    "pip install -r requirements-app.txt", "pip install -r requirements-export.txt",
    "pip install -r requirements-sweep.txt",
    "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu",
    "pip install pre-commit", "pre-commit install",
}  # fmt: skip
MINIATURES = {
    "hmdb51": raw_data.hmdb, "ucf101": raw_data.ucf, "kinetics": raw_data.kinetics,
    "ssv2_full": raw_data.ssv2, "ssv2_small": raw_data.ssv2, "custom": raw_data.hmdb,
}  # fmt: skip


def test_the_pages_contain_commands_of_each_kind():
    for name in MINIATURES:
        assert any(command.startswith(f"python run/prepare.py {name} ") for command in COMMANDS)
    for start in ("sh train_test.sh", "python run/run.py", "torchrun", "tensorboard"):
        assert any(command.startswith(start) for command in COMMANDS)
    assert set(COMMANDS) >= ELSEWHERE


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint to test, trained with the same small model that the commands are shrunk to."""
    directory = tmp_path_factory.mktemp("checkpoint") / "run"
    main(["--cfg", str(ROOT / "configs/clipspm/hmdb51.yaml"), *tiny_overrides(tiny_dataset, directory)])
    return directory / BEST


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ELSEWHERE])
def test_command_runs(command, tiny_dataset, checkpoint, tmp_path, monkeypatch):
    words = shlex.split(command)
    small = tiny_overrides(tiny_dataset, tmp_path / "run")
    if "TEST.ONLY_TEST=true" in words:
        small.append(f"TEST.TEST_MODEL_PATH={checkpoint}")
    if "MODEL.ADAPTER=side-network" in words:
        small += ["MODEL.BACKBONE=tiny-vit", "MODEL.SIDE.WIDTH=32", "MODEL.SIDE.HEAD_DIM=16"]
    if "MODEL.TEXT_FILE=texts.yaml" in words:
        small.append(f"MODEL.TEXT_FILE={sentences(tiny_dataset, tmp_path / 'texts.yaml')}")
    monkeypatch.setattr("run.rejection.EPISODES", 20)
    monkeypatch.chdir(ROOT)
    if words[:2] == ["python", "run/run.py"]:
        main([*words[2:], *small])
        assert "--profile" not in words or (tmp_path / "run" / "profile.pt.trace.json").is_file()
    elif words[:2] == ["sh", "train_test.sh"]:
        assert "tiny 5-way" in run(*words, *small, PYTHON=sys.executable)
        assert not (tmp_path / "run" / "data").exists()
    elif words[:2] == ["python", "run/compare.py"]:
        run_compare(words[2:], small, checkpoint, tmp_path)
    elif words[:2] == ["python", "run/convert.py"]:
        released = tmp_path / "released.pt"
        torch.save(released_content(learner_of("clipspm", tiny_dataset, tmp_path / "source"), "clipspm"), released)
        printed_by(words[1], released, tmp_path / "ours.pt")
    elif words[:2] in (["python", "run/predict.py"], ["python", "run/calibrate.py"]):
        run_prediction(words[1:], checkpoint, tiny_dataset, tmp_path)
    elif words[:2] == ["python", "run/export.py"]:
        run_export(words[2:], checkpoint, tmp_path)
    elif words[1] == "run/app.py":  # the page itself is tested in test_app.py
        assert words[2] == "--checkpoint"
        assert "usage" in printed_by(words[1], "--help")
    elif words[1] == "docs/images/demo_actions.py":
        run(sys.executable, *words[1:], tmp_path)
        assert len(list(tmp_path.rglob("*.mp4"))) == 7
    elif words[:2] == ["python", "run/sweep.py"]:  # test_sweep.py runs one
        folder = ["--out", str(tmp_path / "sweep")]
        if "--only-table" in words:
            with pytest.raises(UserError, match="no finished run"):
                sweep([*words[2:], *folder])
            assert not (tmp_path / "sweep").exists()
        else:
            sweep([*words[2:], *folder, "--dry-run"])
    elif words[1].startswith("benchmarks/"):
        run_benchmark(words[1:], tmp_path)
    elif words[0] == "torchrun":
        run(sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:], *small)
        assert (tmp_path / "run" / "results.json").is_file()
    elif words[0] == "tensorboard":
        assert "--logdir" in words
        run(sys.executable, "-m", "tensorboard.main", "--version_tb")
    elif words[:2] == ["python", "run/report.py"]:
        run_report(words[2:], checkpoint.parent, tiny_dataset, tmp_path)
    elif words[:3] == ["python", "run/prepare.py", "demo"]:
        clips = ["--out", str(tmp_path / "demo"), "--train-clips", "1", "--eval-clips", "1", "--workers", "1"]
        printed_by(*words[1:], *clips)
    elif words[:2] == ["python", "run/prepare.py"]:
        run_prepare(words[2:], tmp_path)
    else:
        pytest.fail(f"the test does not know how to run {command!r}")


def sentences(data: TinyDataset, path: Path) -> Path:
    """Writes a text file with a sentence for each class."""
    content = yaml.safe_load((data.splits / "classes.yaml").read_text())
    names = [entry["prompt"] for split in ("train", "val", "test") for entry in content[split]]
    path.write_text(yaml.safe_dump({name: [f"a person does {name}"] for name in names}))
    return path


def run(*words: str | Path, **environment: str) -> str:
    """Runs a command that must succeed and returns its standard output."""
    variables = {**os.environ, **environment}
    return subprocess.run(words, check=True, env=variables, capture_output=True, text=True).stdout


def printed_by(script: str, *words: str | Path) -> str:
    """Runs a script in this process, where it must succeed, and returns its standard output."""
    finished = in_process(script, *words)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def run_compare(words: list[str], small: list[str], checkpoint: Path, tmp_path: Path) -> None:
    """Runs a comparison: all of its runs are results of one small checkpoint, and its files are in tmp_path."""
    tested = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={checkpoint}"]
    main(["--cfg", str(ROOT / "configs/clipspm/hmdb51.yaml"), *small, *tested])
    files = [tmp_path / word for word in words if word.startswith("comparison.")]
    words = [str(tmp_path / "run") if word.startswith("checkpoints/") else word for word in words]
    compare([str(tmp_path / word) if word.startswith("comparison.") else word for word in words])
    assert all(file.is_file() for file in files)


def run_prediction(words: list[str], checkpoint: Path, data: TinyDataset, tmp_path: Path) -> None:
    """Runs `predict.py` or `calibrate.py` with the tiny data set instead of a user's clips; writes to tmp_path."""
    for name in ("test_action_0", "test_action_1"):
        (tmp_path / "my_actions" / name).mkdir(parents=True)
        shutil.copy(data.videos / name / f"{name}_00.mp4", tmp_path / "my_actions" / name)
    options = [word for word in words if word.startswith("--")]
    places = {"--checkpoint": checkpoint, "--support": tmp_path / "my_actions"}
    outputs = [
        tmp_path / words[words.index(option) + 1] for option in ("--csv", "--json", "--picture") if option in words
    ]
    if "--cfg" in words:
        learner = learner_of("clipspm", data, tmp_path / "source")
        places |= {"--checkpoint": tmp_path / "released.pt", "--cfg": tmp_path / "run.yaml"}
        torch.save(released_content(learner, "clipspm"), places["--checkpoint"])
        save_config(learner.config, places["--cfg"])
    if "--out" in words:
        outputs.append(tmp_path / words[words.index("--out") + 1])
    if "--reject" in words:
        places["--reject"] = tmp_path / "reject.json"
        calibrate(["--checkpoint", str(checkpoint), "--way", "2", "--shot", "1", "--out", str(places["--reject"])])
    changed = {output.name: str(output) for output in outputs}
    for option, place in places.items():
        if option in options:
            changed[words[words.index(option) + 1]] = str(place)
    if words[0] == "run/calibrate.py":
        calibrate([*(changed.get(word, word) for word in words[1:]), "--way", "2", "--shot", "1"])
    else:
        clip = str(data.videos / "test_action_0" / "test_action_0_01.mp4")
        queries = {word: clip for word in words if word.endswith(("/", "clip.mp4", "long.mp4"))}
        assert predict([changed.get(word, queries.get(word, word)) for word in words[1:]]) == 0
    assert all(output.stat().st_size for output in outputs)


def run_export(words: list[str], checkpoint: Path, tmp_path: Path) -> None:
    """Runs an export of the small checkpoint to tmp_path."""
    if "onnx" in words:
        pytest.importorskip("onnxscript", reason="pip install -r requirements-export.txt")
        pytest.importorskip("onnxruntime", reason="pip install -r requirements-export.txt")
    places = {"--checkpoint": str(checkpoint), "--output": str(tmp_path / "exported")}
    for option, place in places.items():
        words[words.index(option) + 1] = place
    export(words)
    assert (tmp_path / "exported/export.json").is_file()


def run_benchmark(words: list[str], tmp_path: Path) -> None:
    """Runs a benchmark at a small size, whose output must contain some words."""
    out = str(tmp_path / "out.md")
    size = ["--backbone", "tiny", "--size", "32", "--frames", "2", "--way", "2", "--shot", "1", "--query", "1"]
    sizes, expected = {
        "parity.py": ([], '"method": "clipspm"'),
        "memory.py": ([*size, "--method", "otam", "--out", out], "TRAINABLE head, CACHED_FEATURES"),
        "training.py": (["--method", "otam", *size, "--episodes", "1"], "ACTIVATION_CHECKPOINTING"),
    }[Path(words[0]).name]
    printed = printed_by(*words, *sizes)
    assert expected in printed + (Path(out).read_text() if Path(out).is_file() else "")


def run_report(words: list[str], directory: Path, data: TinyDataset, tmp_path: Path) -> None:
    """Runs a report of the checkpoint's run instead of the named one."""
    if report.missing([str(report.REQUIREMENTS)]):
        pytest.skip("pip install -r requirements-report.txt")
    place = str(directory / "results.json" if words[0].endswith(".json") else directory)
    changes = [f"DATA.DATA_DIR={data.videos}" if word.startswith("DATA.DATA_DIR") else word for word in words[1:]]
    report.main([place, "--out", str(tmp_path / "report"), "--mistakes", "1", "--videos", "9", *changes])
    assert "mistake" in (tmp_path / "report/report.html").read_text(encoding="utf-8")


def run_prepare(words: list[str], tmp_path: Path) -> None:
    """Runs a command that needs downloads on a miniature: its folders are replaced, everything else stays."""
    if words[0] == "check":
        raw, split_dir = raw_data.hmdb(tmp_path)
        prepare("hmdb51", "--videos", raw, "--split-dir", split_dir, "--out", tmp_path / "out")
        changes = [f"DATA.DATA_DIR={tmp_path / 'out/packed'}", f"DATA.SPLIT_DIR={tmp_path / 'out/splits'}"]
        small = ["TRAIN.WAY=2", "TRAIN.SHOT=1", "TRAIN.QUERY_PER_CLASS=1", "TEST.WAY=2", "TEST.SHOT=1"]
        assert "complete" in prepare(*words, *changes, *small).stdout
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
    assert "complete: every expected video is there" in prepare(*words).stdout
    assert (tmp_path / "out/packed/test.sqlite").is_file()


def test_the_data_page_states_the_video_counts_of_the_class_lists():
    for name, folder in DATASETS.items():
        content = yaml.safe_load((ROOT / "splits" / folder / "classes.yaml").read_text(encoding="utf-8"))
        (row,) = [line for line in PAGES["docs/data.md"].splitlines() if line.startswith(f"| `{name}` | ")]
        for split in ("train", "val", "test"):
            assert f"{sum(entry['videos'] for entry in content[split]):,}" in row


def test_the_first_command_works_in_a_fresh_copy(tmp_path):
    """Renders the demo, trains and tests; shortened by DEBUG, and without a look at the clips, which are one file."""
    copy = tmp_path / "copy"
    for name in run("git", "-C", ROOT, "ls-files").splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    prefill(copy / "data" / "demo")
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["sh", "train_test.sh", "DEBUG=true", "DATA.CHECK_VIDEOS=false"]
    finished = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "demo 5-way 1-shot, clipspm (tiny):" in finished.stdout
    assert (copy / "checkpoints" / "clipspm_demo" / "results.json").is_file()


def prefill(demo: Path) -> None:
    """Links all clips of the demo set but one of each class to one file, since rendering them takes a minute."""
    chosen = DEMO_SETS["motions"]
    clips = {"train_clips": chosen.train_clips, "eval_clips": chosen.eval_clips}
    clip = demo.parent / "clip.mp4"
    write_video(clip, render_clip("move_left", seed=0, number=0))
    for split, names in chosen.splits.items():
        for name in names:
            (demo / "videos" / name).mkdir(parents=True)
            for number in range(1, clips["train_clips" if split == "train" else "eval_clips"]):
                os.link(clip, demo / "videos" / name / f"{name}_{number:04d}.mp4")
    note = {"renderer": chosen.renderer, "seed": 0, **clips}
    (demo / "demo.yaml").write_text(yaml.safe_dump(note), encoding="utf-8")


def test_every_message_in_troubleshooting_is_in_the_code():
    in_code = [text for name in ("run", "utils", "episodes", "models") for text in messages_in(ROOT / name)]
    section = PAGES["docs/troubleshooting.md"].partition("| message | cause | solution |")[2].partition("\n\n")[0]
    explained = re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)
    assert len(explained) > 10
    assert [message for message in explained if not any(message in text for text in in_code)] == []


def messages_in(folder: Path) -> list[str]:
    """Returns every text in the source files of a folder, with … in place of the values."""
    texts = []
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[sd]", "…", node.value))
    return texts


def test_the_example_class_list_has_the_keys_of_the_shipped_ones():
    (block,) = re.findall(r"```yaml\n(dataset: .*?)```", PAGES["docs/data.md"], re.DOTALL)
    example = yaml.safe_load(block)
    shipped = yaml.safe_load((ROOT / "splits/hmdb_ARN/classes.yaml").read_text(encoding="utf-8"))
    assert example.keys() == shipped.keys()
    for split in ("train", "val", "test"):
        assert all(entry.keys() == shipped["train"][0].keys() for entry in example[split])


def test_the_example_method_passes_all_checks_and_trains(tiny_dataset, tmp_path, monkeypatch):
    code, _ = re.findall(r"```python\n(.*?)```", PAGES["docs/extending.md"], re.DOTALL)
    (config,) = re.findall(r"```yaml\n(.*?)```", PAGES["docs/extending.md"], re.DOTALL)
    module = tmp_path / "model_meanpool.py"
    module.write_text(code, encoding="utf-8")
    settings = str(ROOT / "pyproject.toml")
    monkeypatch.chdir(ROOT)
    run(sys.executable, "-m", "ruff", "check", "--no-cache", "--config", settings, module)
    run(sys.executable, "-m", "ruff", "format", "--check", "--no-cache", "--config", settings, module)
    run(sys.executable, "-m", "mypy", "--config-file", settings, module, MYPYPATH=str(ROOT))

    monkeypatch.syspath_prepend(str(tmp_path))
    outside = code.replace('@register("meanpool")\n', "").replace("from models import register\n", "")
    module.write_text(outside, encoding="utf-8")
    tests = [sys.executable, "-m", "pytest", "tests/test_methods.py", "-k", "MeanPool"]
    printed = run(*tests, METHOD="model_meanpool:MeanPool", PYTHONPATH=str(tmp_path))
    assert "passed" in printed
    assert "failed" not in printed
    yaml_file = tmp_path / "demo.yaml"
    yaml_file.write_text(config.replace("NAME: meanpool", "NAME: 'model_meanpool:MeanPool'"), encoding="utf-8")
    main(["--cfg", str(yaml_file), *tiny_overrides(tiny_dataset, tmp_path / "run")])
    assert (tmp_path / "run" / "results.json").is_file()
    assert main_command.main is main
