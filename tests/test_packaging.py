"""The installable package: dependencies have one source, every source folder is in it, and a run imports its part."""

import ast
import sys

from setuptools.config.pyprojecttoml import read_configuration

from tests.helpers.shipped import ROOT


def lines_of(file: str) -> list[str]:
    """Returns the requirements of a file without comments."""
    lines = (line.partition(" #")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_the_package_depends_on_requirements_txt():
    project = read_configuration(ROOT / "pyproject.toml")["project"]
    assert [line.partition(" #")[0].strip() for line in project["dependencies"]] == lines_of("requirements.txt")


def test_every_requirement_file_is_a_dependency_or_an_extra():
    dynamic = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]["dynamic"]
    sources = [dynamic["dependencies"], *dynamic["optional-dependencies"].values()]
    files = {source["file"] for source in sources}
    found = [*ROOT.glob("requirements*.txt"), *ROOT.glob("tests/requirements*.txt")]
    assert files == {path.relative_to(ROOT).as_posix() for path in found}


def test_the_package_includes_every_source_folder_and_the_public_module():
    setuptools = read_configuration(ROOT / "pyproject.toml")["tool"]["setuptools"]
    tops = ("models", "run", "episodes", "videotransforms", "utils")
    folders = {path.parent.relative_to(ROOT) for top in tops for path in (ROOT / top).rglob("*.py")}
    assert set(setuptools["packages"]) == {".".join(folder.parts) for folder in folders}
    assert setuptools["py-modules"] == ["fsar"]


def test_no_file_beside_a_command_hides_a_standard_module():
    """`python run/run.py` puts run/ first on the path; Python 3.15 adds the module `profiling`."""
    files = {path.stem for path in (ROOT / "run").glob("*.py")}
    assert not files & {*sys.stdlib_module_names, "profiling"}


def imported_at_the_start(*modules: str) -> set[str]:
    """Returns the modules of this project that these import, directly or through others, outside functions."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = ROOT / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or not path.is_file():
            continue
        found.add(name)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_a_training_run_imports_neither_other_commands_nor_options_that_it_does_not_use():
    modules = imported_at_the_start("run.run", "run.main_run", "models.model_clipspm", "models.clip_fsar")
    assert {"run.training_step", "models.tower_plugin", "episodes.video"} <= modules
    others = ("episodes.preparation.", "episodes.demo.", "run.reporting.", "run.sweeping.", "run.pre", "run.replay")
    assert not [name for name in modules if name.startswith(others)]
    assert [name for name in modules if name.startswith("models.model_")] == ["models.model_clipspm"]
    assert not modules & {"models.adapters", "models.adapter_d2st", "models.side_network", "models.backbones"}
