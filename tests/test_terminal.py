"""Unusual characters, locales, closed streams and unsuitable Python versions never cause tracebacks or lost results."""

import ast
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from run import start, stopping
from run.command import exit_code_of
from run.main_run import Learner
from run.meter import rate
from run.results import as_json
from run.stopping import signals_handled
from run.training_step import TrainingStep
from tests.helpers.commands import in_process, tiny_overrides
from tests.helpers.raw_data import render
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_runs import tiny_config
from utils.checkpoint import LAST, load_checkpoint
from utils.errors import UserError
from utils.jobs import is_main_process, progress
from utils.logs import set_up_logging
from utils.utils import choose_device

COMMANDS = sorted(
    f"run/{path.name}" for path in (ROOT / "run").glob("*.py") if "\n    start()\n" in path.read_text(encoding="utf-8")
)
ACCENTED, NOT_UTF8 = "café_中文", "bad\udcff"


def shell(command: str, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a shell command in which "$@" stands for Python and `words`."""
    return subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, *map(str, words)],
        cwd=ROOT, capture_output=True, timeout=300, check=False, env={**os.environ, **environment},
    )  # fmt: skip


# Streams

# Prints the output of a command in unusual environments, then writes a file, as a run writes results.json.
PRINTER = """
import sys
sys.path.insert(0, sys.argv[1])
from run.start import start
start()
for _ in range(2000):
    print("98.55 ± 0.16 % caf\\u00e9 \\udcff", flush=True)
    print("98.55 ± 0.16 %", file=sys.stderr)
open(sys.argv[2], "w").write(sys.getfilesystemencoding())
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_are_written_immediately_and_in_order(unbuffered):
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from run.start import start
start()
for number in range(3):
    print("error", number, file=sys.stderr)
    print("output", number)
    os.write(1, b"direct\\n")
"""
    finished = shell('exec 2>&1; "$@"', "-c", code, ROOT, PYTHONUNBUFFERED=unbuffered)
    expected = [line for number in range(3) for line in (f"error {number}", f"output {number}", "direct")]
    assert finished.stdout.decode().splitlines() == expected


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        ('"$@" >"$OUT"', {"PYTHONIOENCODING": "ascii"}),
        ('"$@" >"$OUT"', {"PYTHONIOENCODING": "iso-8859-2:strict"}),
        ('"$@" >"$OUT"', {"PYTHONIOENCODING": "gbk"}),
        ('"$@" >"$OUT"', {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ('"$@" >"$OUT"', {}),
        ('{ "$@"; echo $? >&3; } 3>&1 >"$OUT" 2>&- | grep -qx 0', {}),
        ('"$@" >&- 2>&- <&-', {}),
        ('{ "$@" 2>&1; echo $? >"$OUT"; } | head -1; grep -qx 0 "$OUT"', {}),
        ('"$@" >/dev/full', {}),
    ],
    ids=["ascii", "latin2", "gbk", "c_locale", "utf8", "closed_error", "all_closed", "closed_pipe", "full_disk"],
)
def test_output_errors_never_stop_a_command(tmp_path, command, environment):
    out, written, script = tmp_path / "out", tmp_path / "written", tmp_path / "printer.py"
    script.write_text(PRINTER, encoding="utf-8")
    finished = shell(command, script, ROOT, written, OUT=str(out), **environment)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert written.read_text() == "utf-8"
    assert b"Traceback" not in finished.stderr
    if "full" in command:
        assert b"No space left" in finished.stderr
    if environment:
        text = out.read_bytes().decode(environment.get("PYTHONIOENCODING", "ascii").split(":")[0])
        assert re.match(r"98\.55 (\+/-|±) 0\.16 % caf(é|\\xe9) \\udcff\n", text)


def test_a_run_into_a_closed_pipe_writes_its_results(tiny_dataset, tmp_path):
    """Runs the complete command, in ASCII, into a closed pipe."""
    directory = tmp_path / ACCENTED
    words = ["run/run.py", "--cfg", "configs/zeroshot/demo.yaml", *tiny_overrides(tiny_dataset, directory)]
    command = '{ "$@" 2>&1; echo $? >"$CODE"; } | head -1'
    shell(command, *words, CODE=str(tmp_path / "code"), PYTHONIOENCODING="ascii")
    assert (tmp_path / "code").read_text() == "0\n"
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    assert results["checkpoint"].startswith(str(directory))
    assert "zeroshot (tiny): " in (directory / "log.txt").read_text(encoding="utf-8")
    assert f"CHECKPOINT_DIR: {directory}\n" in (directory / "config.yaml").read_text(encoding="utf-8")


def test_training_and_testing_work_in_a_directory_that_is_not_utf8(tiny_dataset, tmp_path):
    directory = tmp_path / NOT_UTF8
    words = ["run/run.py", "--cfg", "configs/clipspm/demo.yaml", *tiny_overrides(tiny_dataset, directory)]
    finished = shell('"$@"', *words, PYTHONIOENCODING="ascii")
    assert finished.returncode == 0, finished.stderr
    assert json.loads((directory / "results.json").read_text(encoding="utf-8"))["checkpoint_episodes"] > 0
    (directory / "results.json").unlink()
    tested = in_process(*words, "TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={directory / LAST}")
    assert tested.returncode == 0, tested.stderr
    assert re.search(r" test: \d+ classes, \d+ videos", tested.stderr)
    assert json.loads((directory / "results.json").read_text(encoding="utf-8"))["checkpoint_episodes"] > 0
    assert {LAST, "log.txt", "config.yaml"} <= {path.name for path in directory.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == [NOT_UTF8]


def test_names_are_stored_as_on_disk_in_any_locale(tmp_path):
    for number, name in enumerate(["a", "b", "c", "d", "e", ACCENTED]):
        render(tmp_path / "raw" / name / f"v_é_{number}.avi", frames=8)
    odd = tmp_path / "raw" / "a" / f"{NOT_UTF8}.avi"
    odd.write_bytes(next((tmp_path / "raw" / "a").iterdir()).read_bytes())
    words = ["custom", "--videos", tmp_path / "raw", "--out", tmp_path / "out", "--size", "32", "--workers", "1"]
    finished = shell('"$@"', "run/prepare.py", *words, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert finished.returncode == 1, finished.stderr
    assert rb"bad\udcff" in finished.stdout
    lists = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "out/splits").glob("*.txt"))
    assert f"{ACCENTED}/v_é_5\n" in lists
    assert (tmp_path / "out/frames" / ACCENTED / "v_é_5").is_dir()
    assert ACCENTED in (tmp_path / "out/report.txt").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))["report"]
    (missing,) = [entry["video"] for part in report["splits"].values() for entry in part["missing"]]
    assert missing == f"a/{NOT_UTF8}"


def test_json_keeps_names_that_are_not_utf8():
    content = {"name": f"{ACCENTED}/{NOT_UTF8}"}
    assert json.loads(as_json(content).decode("utf-8")) == content
    assert ACCENTED.encode() in as_json(content)


# Outside the environment


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_outside_the_environment_is_reported_in_one_sentence(command):
    finished = shell('"$@"', "-S", command, "--help")  # -S: without installed packages
    assert finished.returncode == 2
    (line,) = finished.stderr.decode().splitlines()
    assert line.startswith("error: ")
    for part in (sys.executable, "torch is not installed", str(ROOT / ".venv")):
        assert part in line


def test_old_python_and_packages_are_reported_unless_optional(monkeypatch):
    assert start.interpreter_problem() == ""
    monkeypatch.setattr("run.requirements.version", lambda name: {"pydantic": "1.10.2"}.get(name, "9999"))
    assert "pydantic 1.10.2 is older than 2.10" in start.interpreter_problem()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    assert "Python 3.10 or newer is needed, this is 3.9.2" in start.interpreter_problem()


def test_an_incomplete_environment_is_reported_with_the_fix(monkeypatch, tmp_path):
    monkeypatch.setattr("run.requirements.version", lambda name: "0")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(start, "ENVIRONMENT", tmp_path)
    assert "activate" in start.interpreter_problem()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert "activate" not in start.interpreter_problem()
    assert "sh train_test.sh" in start.interpreter_problem()


def test_an_old_python_can_report_the_error():
    trees = {name: ast.parse((ROOT / name).read_text("utf-8"), feature_version=(3, 8)) for name in COMMANDS}
    started_by = {
        name: ast.unparse(next(n for n in tree.body if isinstance(n, ast.If))) for name, tree in trees.items()
    }
    assert all("start()" in text for text in started_by.values())
    tree = ast.parse((ROOT / "run/start.py").read_text(encoding="utf-8"), feature_version=(3, 6))
    assert "__future__" not in [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    hints = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.arg) and node.annotation]
    assert all(isinstance(hint, ast.Name) for hint in hints)  # `str | None` fails there when it is evaluated


def test_a_cpu_build_on_a_gpu_machine_gives_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("utils.utils.DRIVER", tmp_path / "driver")
    choose_device("auto")
    assert not caplog.records
    (tmp_path / "driver").touch()
    assert choose_device("auto").type == "cpu"
    assert "CPU build" in caplog.text


# The log


def log_of(directory: Path) -> list[str]:
    return (directory / "log.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_log_has_training_lines_and_result_with_dates(tiny_dataset, tmp_path, monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setenv("TERM", "xterm")
    learner = Learner(tiny_config(tiny_dataset, tmp_path / "run"))
    learner.train()
    learner.test()
    lines, output = log_of(tmp_path / "run"), capsys.readouterr()
    for done in (2, 4, 6):
        assert len([line for line in lines if f"train {done}/6: loss " in line]) == 1
        assert f"train {done}/6: loss " in output.err
    assert [line for line in lines if line.endswith(output.out.strip())]
    assert output.out.strip() not in output.err  # it is on the terminal once
    dated = [line for line in lines if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)]
    assert len(dated) >= 8
    if is_terminal:
        assert re.findall(r"train: *(\d+)%[^\r]* (\d+)/6 ", output.err)[-1] == ("100", "6")


def test_the_log_contains_earlier_warnings(tiny_dataset, tmp_path):
    set_up_logging()
    choose = "before there is a run directory"
    logging.getLogger(str(ROOT)).warning(choose)
    learner = Learner(tiny_config(tiny_dataset, tmp_path / "run"))
    learner.train()
    (line,) = [line for line in log_of(tmp_path / "run") if line.endswith(choose)]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)


def test_the_log_of_a_test_run_does_not_block_training(tiny_dataset, tmp_path, capsys):
    trained = Learner(tiny_config(tiny_dataset, tmp_path / "trained"))
    trained.train()
    test = ("TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={tmp_path / 'trained' / 'checkpoint_best.pt'}")
    config = tiny_config(tiny_dataset, tmp_path / "run", *test)
    set_up_logging()
    capsys.readouterr()
    Learner(config).test()
    output = capsys.readouterr()
    logged = [line.partition(" ")[2] for line in log_of(tmp_path / "run") if line[:2] == "20"]
    on_terminal = [line for line in output.err.splitlines() if re.match(r"\d\d:", line)]
    assert len(on_terminal) >= 4
    assert [line for line in logged if not line.endswith(output.out.strip())] == on_terminal
    assert [line for line in logged if line.endswith(output.out.strip())]
    Learner(tiny_config(tiny_dataset, tmp_path / "run")).train()
    assert load_checkpoint(tmp_path / "run" / LAST)["episode"] == 6


def test_the_log_contains_why_a_run_ended(tiny_dataset, tmp_path, monkeypatch):
    interrupted_at(monkeypatch, 2)
    exit_code_of(lambda: train_with(tiny_config(tiny_dataset, tmp_path / "run")))
    assert "stopped by SIGINT after 4 episodes" in log_of(tmp_path / "run")[-1]


def test_warnings_of_libraries_are_not_logged_but_their_errors_are(tmp_path, capsys):
    set_up_logging(tmp_path / "log.txt")
    files = {"own": ROOT / "run/main_run.py", "installed": ROOT / "lib/site-packages/a.py", "library": "/usr/lib/a.py"}
    for name, file in files.items():
        for level in ("WARNING", "ERROR"):
            line = logging.LogRecord(name, logging.getLevelName(level), str(file), 1, f"{name} {level}", None, None)
            logging.getLogger().handle(line)
    expected = ["own WARNING", "own ERROR", "installed ERROR", "library ERROR"]
    for lines in (log_of(tmp_path), capsys.readouterr().err.splitlines()):
        assert [" ".join(line.split()[-2:]) for line in lines] == expected


def test_an_unwritable_log_does_not_stop_the_run(tiny_dataset, tmp_path, capsys):
    trained = Learner(tiny_config(tiny_dataset, tmp_path / "trained"))
    trained.train()
    (tmp_path / "run" / "log.txt").mkdir(parents=True)
    test = ("TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={tmp_path / 'trained' / 'checkpoint_best.pt'}")
    Learner(tiny_config(tiny_dataset, tmp_path / "run", *test)).test()
    assert capsys.readouterr().err.count("cannot write") == 1
    assert (tmp_path / "run" / "results.json").is_file()


def test_a_log_line_with_unusual_characters_is_written(tmp_path):
    set_up_logging(tmp_path / "log.txt")
    logging.getLogger(str(ROOT)).info("video %s/%s", ACCENTED, NOT_UTF8)
    assert rf"{ACCENTED}/bad\udcff" in log_of(tmp_path)[-1]


def test_a_slow_rate_is_shown_in_seconds_per_episode():
    assert rate(0.25) == "4.00 s/episode"
    assert rate(1.5) == "1.50 episodes/s"


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_a_progress_bar_is_drawn_only_on_a_terminal(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", terminal)
    with progress(None, 4, "train") as bar:
        bar.update(4)
    output = capsys.readouterr().err
    assert "4/4" in output.split("\r")[-1] if terminal == "xterm" else output == ""


# Ctrl-C


def interrupted_at(patches: pytest.MonkeyPatch, episode: int, times: int = 1) -> None:
    """Presses Ctrl-C during a training episode."""
    forward = TrainingStep.forward

    def forward_and_interrupt(step: TrainingStep, clips: Any) -> Any:
        for _ in range(times if clips.index == episode else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return forward(step, clips)

    patches.setattr(TrainingStep, "forward", forward_and_interrupt)


def train_with(config: Any) -> None:
    with signals_handled():
        Learner(config).train()


def test_ctrl_c_finishes_the_step_saves_and_names_resume(tiny_dataset, tmp_path, monkeypatch, capfd):
    interrupted_at(monkeypatch, 2)
    config = tiny_config(tiny_dataset, tmp_path / "run", "DATA.NUM_WORKERS=1")
    assert exit_code_of(lambda: train_with(config)) == 130
    output = capfd.readouterr().err
    assert "stopped by SIGINT after 4 episodes" in output
    assert "--resume" in output
    assert "a second signal ends" in output
    assert load_checkpoint(tmp_path / "run" / LAST)["episode"] == 4


def test_a_second_ctrl_c_stops_immediately(tiny_dataset, tmp_path, monkeypatch):
    ends: list[int] = []
    monkeypatch.setattr(stopping.os, "_exit", ends.append)
    interrupted_at(monkeypatch, 2, times=2)
    exit_code_of(lambda: train_with(tiny_config(tiny_dataset, tmp_path / "run")))
    assert ends == [130]


def test_signals_of_schedulers_and_ctrl_c_have_different_exit_codes():
    def main(number: int) -> None:
        with signals_handled():
            os.kill(os.getpid(), number)

    codes = [exit_code_of(lambda number=number: main(number)) for number in (signal.SIGINT, signal.SIGTERM)]  # type: ignore[misc]
    assert codes == [130, 75]


# One name for resuming


def test_messages_mention_resume_only(tiny_dataset, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--resume"):
        Learner(tiny_config(tiny_dataset, tmp_path)).train()
    pattern = re.compile(r"RESUME_FROM_CHECKPOINT=true|CHECKPOINT\.RESUME_FROM_CHECKPOINT(?!\))")
    sources = [path for folder in ("run", "utils") for path in (ROOT / folder).glob("*.py")]
    assert [path.name for path in sources if any(map(pattern.search, printed_texts(path)))] == ["run.py"]


def printed_texts(path: Path) -> Sequence[str]:
    """Returns every text in a source file but for attributes and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_only_the_first_process_of_all_machines_prints(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    for rank, is_main in [("0", True), ("2", False)]:
        monkeypatch.setenv("RANK", rank)
        assert is_main_process() is is_main
