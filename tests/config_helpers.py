"""What the config tests share: a registry of two made-up methods, and short ways to load and to fail."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from utils.config import LoadedConfig, load_config
from utils.errors import UserError
from utils.schema import ModelOptions, Section


class Hsmr(Section):
    ENABLED: bool = True
    HEADS: int = Field(8, ge=1)
    KIND: Literal["motion", "plain"] = "motion"


class Spm(Section):
    ENABLED: bool = True
    LAMBDA: float = 0.5

    @model_validator(mode="after")
    def _check(self) -> "Spm":
        if self.LAMBDA == 13:
            raise ValueError("MODEL.SPM.LAMBDA must not be 13 while MODEL.SPM.ENABLED is true.")
        return self


class FakeOptions(ModelOptions):
    """Options of a method called clipspm."""

    HSMR: Hsmr = Hsmr()
    SPM: Spm = Spm()


class OtherOptions(ModelOptions):
    """Options of a method called otam."""

    GAMMA: float = 0.1


class RequiredOptions(ModelOptions):
    """Options of a method called required, one of which has no default."""

    WIDTH: int


METHODS: dict[str, type[ModelOptions]] = {"clipspm": FakeOptions, "otam": OtherOptions, "required": RequiredOptions}


def options_of(name: str) -> type[ModelOptions]:
    if name not in METHODS:
        raise UserError(f"MODEL.NAME: unknown method {name!r}, known are clipspm, otam")
    return METHODS[name]


def load(path: Path, *overrides: str) -> LoadedConfig:
    return load_config(path, overrides, lambda message: None, options_of, lambda: METHODS)


def load_text(folder: Path, text: str | bytes, *overrides: str) -> LoadedConfig:
    """The config of an experiment file with this content."""
    path = folder / "x.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load(path, *overrides)


def refusal(action: Callable[[], object]) -> str | None:
    """What the action says when it refuses, None when it goes through; any other exception passes on."""
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def problem_of(folder: Path, text: str | bytes, *overrides: str) -> str:
    """The message of a config that must fail, with the file's folder cut off."""
    message = refusal(lambda: load_text(folder, text, *overrides))
    assert message is not None, "this config should have been refused"
    return message.replace(f"{folder}/", "")
