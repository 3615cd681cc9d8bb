"""Helpers of the config tests: a method with a required option, and functions that load configs and catch errors."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from models.base import FewShotModel
from utils.config import LoadedConfig, load_config
from utils.errors import UserError
from utils.schema import ModelOptions


class RequiredOptions(ModelOptions):
    """Options of a method, one of which has no default."""

    WIDTH: int


class RequiredMethod(FewShotModel):
    """A method from outside the package; only its options matter."""

    Options = RequiredOptions

    def encode(self, frames: Tensor) -> Tensor:
        raise NotImplementedError

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        raise NotImplementedError


REQUIRED = f"{__name__}:RequiredMethod"


def load_text(folder: Path, text: str | bytes, *overrides: str) -> LoadedConfig:
    """Returns the config of an experiment file with this content."""
    path = folder / "x.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, overrides, warn=lambda message: None)


def refusal(action: Callable[[], object]) -> str | None:
    """Returns the message of the action's UserError, or None without one; other exceptions propagate."""
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def problem_of(folder: Path, text: str | bytes, *overrides: str) -> str:
    """Returns the message of a config that must fail, with the file's folder cut off."""
    message = refusal(lambda: load_text(folder, text, *overrides))
    assert message is not None, "this config should have been refused"
    return message.replace(f"{folder}/", "")


BILLION_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
