"""Mistakes in the options of a method, found without PyTorch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import model_validator

import models
from models.model_clipspm import ClipSpmOptions
from tests.helpers.configs import load_text, problem_of
from utils.config import REPOSITORY, config_from_dict, config_to_dict

NO_TORCH = """
import json, sys
from utils.config import load_config
from utils.errors import UserError
from utils.method_options import method_names, options_without_torch
problems = []
for config in sys.argv[1:]:
    try:
        load_config(config)
    except UserError as error:
        problems.append(str(error))
schemas = {name: options_without_torch(name).model_json_schema() for name in method_names()}
assert not {"torch", "open_clip", "models"} & set(sys.modules)
print(json.dumps([problems, schemas]))
"""


WRONG = {
    "TRAIN: {SHOTS: 1, WAY: x}\nMODEL: {NAME: otam, BACKBONE: RN50}": ("TRAIN.SHOTS", "TRAIN.WAY"),
    "MODEL: {HSRM: {ENABLED: false}}": ("MODEL.HSRM",),
    "MODEL: {HSMR: {ENABLD: false, WEIGHT: -1}}": ("MODEL.HSMR.ENABLD", "MODEL.HSMR.WEIGHT"),
    "MODEL: {PADM: {ENABLED: false}, DISTANCES: {PROTOTYPE: 0}}": ("MODEL.DISTANCES.PROTOTYPE",),
    "MODEL: {NAME: otam, ADAPTIVE: true}": ("MODEL.ADAPTIVE", "option of a2m2"),
    "MODEL: {NAME: clipsmp}": ("did you mean clipspm",),
    "MODEL: {NAME: 3}": ("MODEL.NAME",),
}


def test_problems_are_found_without_pytorch(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.yaml" for number in range(len(WRONG))]
    for file, text in zip(files, WRONG, strict=True):
        file.write_text(text)
    command = [sys.executable, "-c", NO_TORCH, *map(str, files)]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    problems, schemas = json.loads(found)
    for problem, facts in zip(problems, WRONG.values(), strict=True):
        assert all(fact in problem for fact in facts), problem
    assert schemas == {name: models.options_of(name).model_json_schema() for name in models.available()}


def test_a_check_that_needs_a_package_waits_for_the_import_of_the_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unfinished(ClipSpmOptions):
        @model_validator(mode="after")
        def _check(self) -> "Unfinished":
            return numpy_is_not_imported  # type: ignore[name-defined]  # noqa: F821

    monkeypatch.setattr("utils.config._quick_options_of", lambda method: Unfinished)
    assert isinstance(load_text(tmp_path, "MODEL: {NAME: clipspm}").config.MODEL, ClipSpmOptions)
    assert "MODEL.HSMR" in problem_of(tmp_path, "MODEL: {NAME: clipspm, HSMR: 3}")


@pytest.mark.parametrize(
    ("method", "section", "value"),
    [("d2st", "SIDE", "WIDTH: 128"), *(("strm", section, "BLOCKS: 2") for section in ("AIM", "D2ST"))],
)
def test_the_section_of_an_adapter_that_a_method_does_not_accept_has_only_defaults(
    tmp_path: Path, method: str, section: str, value: str
) -> None:
    problem = problem_of(tmp_path, f"MODEL: {{NAME: {method}, {section}: {{{value}}}}}")
    key, _, changed = value.partition(": ")
    assert all(fact in problem for fact in (f"MODEL.{section}.{key} is {changed}", "MODEL.ADAPTER", method))
    stored = config_to_dict(load_text(tmp_path, f"MODEL: {{NAME: {method}}}").config)
    assert section in stored["MODEL"]  # as in older checkpoints
    assert config_to_dict(config_from_dict(stored)) == stored
    owners = problem_of(tmp_path, f"MODEL: {{NAME: a2m2, {section}: {{{value}}}}}").partition("option of ")[2]
    assert "trx" in owners
    assert method not in owners
