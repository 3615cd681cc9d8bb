"""The installable package: dependencies have one source, and every source folder is in it."""

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
