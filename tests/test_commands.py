"""The commands as a user runs them: exit codes, clear messages, no partial files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from run.command import plain_message, run_command
from run.requirements import missing
from run.run import shortened
from tests.helpers.commands import main_command, sentences_of, tiny_overrides
from tests.helpers.shipped import ROOT
from utils.config import load_config
from utils.errors import UserError


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a separate process, from the repository's root."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_a_run_prints_one_result_line_on_standard_output(tiny_dataset, tmp_path):
    words = ["--cfg", "configs/clipspm/demo.yaml", *tiny_overrides(tiny_dataset, tmp_path / "run")]
    finished = run("run/run.py", *words)  # the whole of a process
    assert finished.returncode == 0, finished.stderr
    (line,) = finished.stdout.splitlines()
    for part in ("tiny 5-way 1-shot", "clipspm", "±", "8 episodes", "split=test", "protocol=inductive", "seed=1"):
        assert part in line
    assert str(tmp_path / "run" / "results.json") in finished.stderr


def test_a_misspelt_key_gets_a_suggestion():
    assert "DEUG" in (output := sentences_of(main_command("configs/clipspm/demo.yaml", "DEUG=false"))[0])
    assert "DEBUG" in output.replace("DEUG", "")


def test_a_tab_in_a_config_is_named(tmp_path):
    (config := tmp_path / "tab.yaml").write_text("MODEL:\n\tNAME: otam\n")
    (message,) = sentences_of(main_command(config))
    for part in (str(config), "line 2", "tab", "spaces"):
        assert part in message


def test_print_config_prints_yaml_with_origins_and_runs_nothing(tmp_path):
    finished = main_command("configs/clipspm/hmdb51.yaml", "TRAIN.SHOT=3", "--print-config")
    assert finished.returncode == 0
    assert yaml.safe_load(finished.stdout)["TRAIN"]["SHOT"] == 3
    (line,) = [line for line in finished.stdout.splitlines() if line.strip().startswith("SHOT: 3")]
    assert "command line" in line


def test_a_released_config_loads_with_a_warning_for_each_old_key(tmp_path):
    published = {
        "MODEL": {"NAME": "clipspm", "BACKBONE": "RN50", "SEED": 6},
        "TRAIN": {"WAY": 5, "SHOT": 5, "CLASS_NAME": ["brush hair", "catch"]},
        "TEST": {"ONLY_TEST": True, "TEST_MODEL_PATH": "best.pt", "CLASS_NAME": ["fencing"]},
        "DATA": {"DATASET": "hmdb", "DATA_DIR": "/somewhere"},
        "DEVICE": {"DEVICE": "cuda", "NUM_GPUS": 1, "GPU_ID": 0},
    }
    path = tmp_path / "hmdb.yaml"
    path.write_text(yaml.safe_dump(published), encoding="utf-8")
    finished = main_command(path, "--print-config")
    assert finished.returncode == 0, finished.stderr
    for key in ("TRAIN.CLASS_NAME", "TEST.CLASS_NAME", "DATA.DATASET", "DEVICE.NUM_GPUS", "DEVICE.GPU_ID"):
        assert sum(key in line for line in finished.stderr.splitlines()) == 1
    assert yaml.safe_load(finished.stdout)["DATA"]["DATASET"] == "hmdb51"


def test_missing_config_and_data_are_reported_in_one_sentence(tmp_path):
    assert "nowhere.yaml" in sentences_of(main_command("nowhere.yaml"))[0]
    overrides = ("DATA.DATA_DIR=nowhere/at/all", f"CHECKPOINT.CHECKPOINT_DIR={tmp_path / 'run'}")
    assert "nowhere/at/all" in sentences_of(main_command("configs/clipspm/hmdb51.yaml", *overrides))[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_video_broken_during_a_run_is_reported_in_one_sentence(tiny_dataset, tmp_path, workers):
    for video in sorted(tiny_dataset.videos.glob("*/*.mp4")):
        copy = tmp_path / "videos" / video.relative_to(tiny_dataset.videos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"not a video" if "train" in video.name else video.read_bytes())
    overrides = [*tiny_overrides(tiny_dataset, tmp_path / "run"), f"DATA.DATA_DIR={tmp_path / 'videos'}"]
    checked = sentences_of(main_command("configs/clipspm/demo.yaml", *overrides))
    assert sum("train_action" in line for line in checked) > 20  # all of them, not the first
    assert not (tmp_path / "run").exists()
    unchecked = [*overrides, "DATA.CHECK_VIDEOS=false", f"DATA.NUM_WORKERS={workers}"]
    finished = main_command("configs/clipspm/demo.yaml", *unchecked)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert "train_action" in line


def test_a_second_run_in_a_directory_is_refused_with_both_alternatives(tiny_dataset, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    (sentence,) = sentences_of(main_command("configs/clipspm/demo.yaml", *tiny_overrides(tiny_dataset, tmp_path)))
    assert "--resume" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_missing_gpu_is_reported_in_one_sentence(tiny_dataset, tmp_path, monkeypatch):
    overrides = tiny_overrides(tiny_dataset, tmp_path / "run")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    finished = main_command("configs/clipspm/demo.yaml", *overrides, "DEVICE.DEVICE=cuda")
    assert "DEVICE.DEVICE=cpu" in sentences_of(finished)[0]


@pytest.mark.parametrize("script", ["train_test.sh", "run_tests.sh", "run/environment.sh", ".ci/run"])
def test_scripts_are_valid_shell(script):
    subprocess.run(["sh", "-n", script], cwd=ROOT, check=True)


def test_ci_runs_the_test_command_of_the_readme():
    assert "run_tests.sh" in (ROOT / ".ci" / "run").read_text()
    assert "sh run_tests.sh" in (ROOT / "README.md").read_text(encoding="utf-8")


# The parts


def test_met_outdated_and_missing_requirements_are_distinguished(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text(
        "# comment\ntorch>=2.10   # fine\nnumpy>=9999\nno-such-package>=1.0\n"
        'no-such-package>=1.0; platform_machine == "no-such-machine"\n'
    )
    old, absent = missing([str(file)])
    assert "numpy" in old
    assert "older than 9999" in old
    assert absent == "no-such-package is not installed"
    assert missing([str(ROOT / "requirements.txt"), str(ROOT / "tests" / "requirements.txt")]) == []


def test_user_errors_exit_with_2_and_ctrl_c_with_130(capsys):
    def mistake() -> None:
        raise UserError("expected this, found that, do so")

    def interrupt() -> None:
        raise KeyboardInterrupt

    for main, code in ((mistake, 2), (interrupt, 130)):
        with pytest.raises(SystemExit) as left:
            run_command(main)
        assert left.value.code == code
    assert "error: expected this, found that, do so\n" in capsys.readouterr().err


def test_a_user_error_of_a_worker_is_extracted_from_its_traceback():
    wrapped = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\nutils.errors.UserError: a.mp4: cannot be read\n'
    )
    assert plain_message(UserError(wrapped)) == "a.mp4: cannot be read"
    assert plain_message(UserError("plain")) == "plain"


def test_debug_shortens_and_never_lengthens(tiny_dataset, tmp_path):
    finished = main_command("configs/zeroshot/demo.yaml", *tiny_overrides(tiny_dataset, tmp_path / "run"))
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["checkpoint_episodes"], results["episodes"]) == (0, 8)
    few = load_config(ROOT / "configs/clipspm/demo.yaml", ["TRAIN.TRAIN_EPISODES=2", "TEST.TEST_EPISODES=3"]).config
    assert (shortened(few).TRAIN.TRAIN_EPISODES, shortened(few).TEST.TEST_EPISODES) == (2, 3)
    many = shortened(load_config(ROOT / "configs/clipspm/hmdb51.yaml").config).TRAIN
    assert many.TRAIN_EPISODES / many.TASKS_PER_BATCH > 1  # more than one step


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["run/run.py", "--help"], 0),
        (["run/run.py", "--cfg", "nowhere.yaml"], 2),
        (["run/prepare.py", "--help"], 0),
        (["run/prepare.py", "custom", "--videos", "nowhere", "--out", "nowhere/out"], 2),
        (["run/convert.py", "--help"], 0),
        (["run/convert.py", "released.pt", "README.md"], 2),
        (["run/pretrain_demo.py", "--help"], 0),
    ],
    ids=["run", "run_config", "prepare", "prepare_videos", "convert", "convert_target", "pretrain_demo"],
)
def test_help_and_usage_errors_do_not_load_pytorch(words, code):
    """PyTorch takes seconds to load; `-X importtime` lists every module that is loaded."""
    finished = run("-X", "importtime", *words)
    assert finished.returncode == code
    assert re.search(r"\| run\.command$", finished.stderr, re.MULTILINE)
    assert not re.search(r"\| +torch$", finished.stderr, re.MULTILINE)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_during_start_up_is_reported_in_one_sentence(number, code):
    command = [sys.executable, "-X", "importtime", "run/run.py", "--cfg", "configs/clipspm/demo.yaml"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:  # one for each module that is loaded
            if "torch." in line:
                break
        process.send_signal(number)
        output = [line for line in process.stderr.read().splitlines() if "import time" not in line]
    assert process.returncode == code
    assert len(output) == 1
    assert number.name in output[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_to_all_prepare_processes_is_reported_in_one_sentence(tmp_path, number, code):
    words = ["demo", "--out", str(tmp_path), "--train-clips", "40", "--eval-clips", "1", "--workers", "4"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "run/prepare.py", *words]
    with subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()  # "rendering ...", after which its processes start
        time.sleep(0.3)
        os.killpg(process.pid, number)
        (line,) = process.stderr.read().splitlines()
    assert process.returncode == code
    assert number.name in line
    assert not list(tmp_path.rglob("*.part"))


MISTAKES = """
import sys
from run import app, calibrate, compare, convert, export, predict, report
from run.command import exit_code_of

report.raise_if_packages_are_missing = lambda: None
there = ["--checkpoint", __file__]
query = ["--support", "docs", "--query", "nowhere.mp4"]
for command, words in (
    (predict, ["--checkpoint", "nowhere.pt", *query]),
    (export, ["--checkpoint", "docs", "--output", "nowhere"]),
    (calibrate, ["--checkpoint", "nowhere.pt"]),
    (app, ["--checkpoint", "nowhere.pt"]),
    (predict, [*there, "--support", "nowhere", "--query", "docs"]),
    (predict, [*there, *query, "--csv", "nowhere/a", "--json", "./nowhere/a"]),
    (predict, [*there, *query, "--window", "2s", "--picture", "nowhere.gif"]),
    (export, [*there, "--output", "nowhere", "--classes", "nowhere", "nowhere"]),
    (export, [*there, "--output", "nowhere", "--classes", "nowhere.yaml"]),
    (compare, ["docs", "docs", "--html", "nowhere", "--json", "nowhere"]),
    (report, ["nowhere"]),
):
    print(command.__name__, file=sys.stderr)
    assert exit_code_of(lambda: command.main(words)) == 2
print(convert.__name__, file=sys.stderr)
sys.argv[1:] = ["nowhere.pt", "nowhere"]
assert exit_code_of(convert.main) == 2
assert not {"torch", "open_clip", "models", "fsar"} & set(sys.modules)
"""


def test_wrong_paths_are_found_without_pytorch():
    finished = subprocess.run(
        [sys.executable, "-c", MISTAKES.replace("__file__", repr(__file__))],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    messages = re.split(r"^run\.\w+\n", finished.stderr, flags=re.MULTILINE)[1:]
    assert len(messages) == 12
    for message in messages:
        assert message.startswith("error: ")
        assert "nowhere" in message or "docs is a folder" in message
    assert not (ROOT / "nowhere").exists()
