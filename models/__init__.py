"""Methods by name: `available`, `build`, `load`.

A method registers itself with `@register("name")` in a file `models/model_<name>.py`; no other file changes.
A class outside this repository is named by its import path: `my_package.my_module:MyMethod`.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from models.base import FewShotModel
from models.frame_tower import FrameTower
from models.released import convert_released, is_released
from utils import distributed
from utils.checkpoint import load_checkpoint, load_weights
from utils.config import config_from_dict, config_to_dict, load_config
from utils.config_changes import differences_from_training
from utils.errors import UserError, import_problem
from utils.files import raise_if_missing
from utils.method_options import FILE_PREFIX, method_names, raise_if_unknown
from utils.schema import Config, DataOptions, ModelOptions

SHORT_SIDE_TO_CROP = 256 / 224  # as in the default config

logger = logging.getLogger(__name__)

_METHODS: dict[str, type[FewShotModel]] = {}
Method = TypeVar("Method", bound=type[FewShotModel])


def register(name: str) -> Callable[[Method], Method]:
    """Returns a class decorator that makes a method available as `MODEL.NAME: <name>`.

    Raises:
        ValueError: two methods have the same name, or the name differs from the name of the file in this package.
        TypeError: the class is not a few-shot model, or is incomplete.
    """

    def add(method: Method) -> Method:
        expected = method.__module__.removeprefix(f"{__name__}.{FILE_PREFIX}")
        if expected not in (name, method.__module__):  # a copied file would replace the original method
            raise ValueError(f"it registers {name!r}; write @register({expected!r}), the name of the file")
        if fault := _fault(method):
            raise TypeError(f"{method.__name__} {fault}")
        known = _METHODS.setdefault(name, method)
        # A module that is imported a second time defines its class again, which is not a conflict.
        if (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
            raise ValueError(f"two methods are called {name!r}: {known.__module__} and {method.__module__}")
        _METHODS[name] = method
        return method

    return add


def available() -> list[str]:
    """Returns the sorted names of all methods in this package that can be imported."""
    for name in method_names():
        with suppress(UserError):
            method_class(name)
    return sorted(_METHODS)


def method_class(name: str) -> type[FewShotModel]:
    """Returns the class of a `MODEL.NAME`.

    Raises:
        UserError: the method is unknown, or its file cannot be imported or contains no method.
    """
    if ":" in name:
        return _imported(name)
    if name not in _METHODS:
        _import_file_of(name)
    return _METHODS[name]


def _import_file_of(name: str) -> None:
    """Imports the file of a method that is not registered yet."""
    raise_if_unknown(name)
    file = f"models/{FILE_PREFIX}{name}.py"
    try:
        importlib.import_module(f"{__name__}.{FILE_PREFIX}{name}")
    except (Exception, SystemExit) as error:
        raise UserError(
            f"MODEL.NAME: cannot import {name!r}: {import_problem(error, file, __file__)}; correct the file"
        ) from error
    if name not in _METHODS:
        raise UserError(f"MODEL.NAME: {file} registers no method; write @register({name!r}) above its class")


def _imported(name: str) -> type[FewShotModel]:
    """Imports the class `package.module:Class`."""
    module_name, _, class_name = name.partition(":")
    try:
        method = getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:
        problem = import_problem(error, module_name, __file__)
        is_missing = isinstance(error, ModuleNotFoundError)
        advice = "PYTHONPATH must contain the folder of the package" if is_missing else "correct it"
        raise UserError(f"MODEL.NAME: cannot import {name!r} (package.module:Class): {problem}; {advice}") from error
    if fault := _fault(method):
        raise UserError(f"MODEL.NAME: {name!r} {fault}")
    return method


def _fault(method: Any) -> str:
    """Returns why an object is not a method, or ''."""
    if not (isinstance(method, type) and issubclass(method, FewShotModel)):
        return "is not a subclass of models.base.FewShotModel"
    if missing := sorted(method.__abstractmethods__):
        return f"has no {', '.join(missing)}; implement it as models.base.FewShotModel describes"
    if not (isinstance(method.Options, type) and issubclass(method.Options, ModelOptions)):
        return "has Options that are not a subclass of utils.schema.ModelOptions"
    return ""


def options_of(name: str) -> type[ModelOptions]:
    """Returns the class of a method's `MODEL` section.

    Raises:
        UserError: the method is unknown.
    """
    return method_class(name).Options


def build(method: str | ModelOptions, image_size: int = 224, **options: Any) -> FewShotModel:
    """Returns a method with its weights loaded, on the CPU.

    `build("clipspm", BACKBONE="tiny", CLIP_WEIGHTS="random", HSMR={"ENABLED": False})`

    Args:
        method: name of the method, or an instance of its options class.
        image_size: height and width of the frames in pixels.
        options: keys of the config's MODEL section, only together with a name; the defaults are those of the method.

    Raises:
        UserError: unknown method, option or backbone; an impossible size; weights that cannot be loaded; or a method
            with its own backbone and an option that only the backbones of this package support.
    """
    if not isinstance(image_size, int) or image_size < 1:
        raise UserError(f"expected image_size as a whole number of pixels from 1, found {image_size!r}")
    if isinstance(method, str):
        method = config_from_dict({"MODEL": {**options, "NAME": method}}, f"models.build({method!r})").MODEL
    elif options:
        raise TypeError(f"options {', '.join(options)} require the name of a method, not an options object")
    model = method_class(method.NAME)(method, image_size)
    if not any(isinstance(module, FrameTower) for module in model.modules()):
        _check_own_backbone(method)
    model.data = DataOptions(IMG_SIZE=image_size, SHORT_SIDE=round(image_size * SHORT_SIDE_TO_CROP))
    return model


def load(path: str | Path, config: str | Path | None = None, overrides: Sequence[str] = ()) -> FewShotModel:
    """Returns the model of a checkpoint, ready to score: in evaluation mode, on the CPU.

    Args:
        path: a checkpoint of a training run, a converted one, or one that the released code saved.
        config: the YAML file to build the model with. A checkpoint of a training run contains its own; others need it.
        overrides: `KEY=VALUE` pairs that take precedence over the config, such as MODEL.CLIP_WEIGHTS=weights/RN50.pt.

    Returns:
        the model; `model.data` is the DATA section that it was trained with.

    Raises:
        UserError: no such file, no config, or weights that do not fit it.
    """
    settings = config_of(path, config, overrides)
    model = build(settings.MODEL, settings.DATA.IMG_SIZE)
    load_weights_from(Path(path), model, settings)
    model.data = settings.DATA
    return model.eval()


def config_of(path: str | Path, config: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Returns the config for a checkpoint; arguments and errors as in `load`."""
    if isinstance(overrides, str):
        raise UserError(f"expected a list of overrides, found the text {overrides!r}; write [{overrides!r}]")
    raise_if_missing(Path(path))  # before the weights of the backbone are read, or downloaded
    if config is not None:
        return load_config(config, overrides).config
    if stored := load_checkpoint(Path(path)).get("config"):
        return config_from_dict(stored, str(path), overrides=overrides)
    raise UserError(
        f"{path}: contains weights but no config, since it was converted or saved by the released code; give its YAML "
        "file, such as configs/clipspm/released/hmdb51.yaml"
    )


def load_weights_from(path: Path, model: FewShotModel, config: Config) -> dict[str, Any]:
    """Loads the weights of a checkpoint, of this project or of the released code, into a model.

    Args:
        path: the checkpoint; only the main process reads it.
        model: built from `config`.
        config: the config of this run; if the weights do not fit, the message lists its differences from the config
            of the training run.

    Returns:
        the content of the checkpoint.

    Raises:
        UserError: the file is missing, or the weights do not fit.
    """
    content = distributed.from_main(lambda: load_checkpoint(path))
    if is_released(content):
        content, report = convert_released(content, model.released, path)
        logger.info("\n".join(report))
    try:
        load_weights(model, model.weights_to_test(content["model"]), path)
    except UserError as error:
        stored = content.get("config")
        differences = differences_from_training(stored, config_to_dict(config)) if stored else []
        raise UserError("; ".join([str(error), *differences])) from error
    return content


def _check_own_backbone(options: ModelOptions) -> None:
    """Raises UserError for a key that a method with its own backbone would ignore."""
    defaults = ModelOptions()
    for key in ("TRAINABLE", "ACTIVATION_CHECKPOINTING", "COMPILE"):
        if getattr(options, key) != getattr(defaults, key):
            raise UserError(
                f"MODEL.{key} is {getattr(options, key)}, which requires a backbone of models/, but {options.NAME} has "
                f"its own backbone: set MODEL.{key} to its default"
            )
