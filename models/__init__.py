"""The methods, by name: `available`, `build`, `load`.

A method registers itself with `@register("name")` in a file `models/model_<name>.py`; nothing else has to
be touched. A class outside this repository is named by its import path: `my_package.my_module:MyMethod`.
"""

import difflib
import importlib
import logging
import pkgutil
from collections.abc import Callable, Sequence
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
from utils.schema import Config, DataOptions, ModelOptions

FILE_PREFIX = "model_"  # of the modules of this package that hold a method
SHORT_SIDE_TO_CROP = 256 / 224  # of a frame before the crop, as in the default config

logger = logging.getLogger(__name__)

_METHODS: dict[str, type[FewShotModel]] = {}
Method = TypeVar("Method", bound=type[FewShotModel])


def register(name: str) -> Callable[[Method], Method]:
    """Class decorator that makes a method available as `MODEL.NAME: <name>`.

    Raises:
        ValueError: two methods took the same name, or a file of this package another name than its own.
        TypeError: the class is not a few-shot model, or an unfinished one.
    """

    def add(method: Method) -> Method:
        own = method.__module__.removeprefix(f"{__name__}.{FILE_PREFIX}")
        if own not in (name, method.__module__):  # a copied file would take the place of the method it was copied from
            raise ValueError(f"it registers {name!r}; write @register({own!r}), as the file is called")
        if fault := _fault(method):
            raise TypeError(f"{method.__name__} {fault}")
        known = _METHODS.setdefault(name, method)
        # A module that is imported a second time brings its class again, which is not a conflict.
        if (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
            raise ValueError(f"two methods are called {name!r}: {known.__module__} and {method.__module__}")
        _METHODS[name] = method
        return method

    return add


def available() -> list[str]:
    """Names of all methods in this package that can be imported, sorted."""
    _import_all()
    return sorted(_METHODS)


def _import_all() -> list[str]:
    """Imports the files of all methods; returns what is wrong with those that cannot be imported, a phrase each."""
    problems = []
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith(FILE_PREFIX):
            try:
                importlib.import_module(f"{__name__}.{module.name}")
            except (Exception, SystemExit) as error:  # a file under construction fails in any way
                problems.append(import_problem(error, f"models/{module.name}.py", __file__))
    return problems


def method_class(name: str) -> type[FewShotModel]:
    """The class behind `MODEL.NAME`.

    Raises:
        UserError: no such method, with the known ones; or its file cannot be imported or does not hold a method.
    """
    if ":" in name:
        return _imported(name)
    if name not in _METHODS:
        _import_file_of(name)
    return _METHODS[name]


def _import_file_of(name: str) -> None:
    """Imports the file of a method that is not registered yet."""
    file = f"models/{FILE_PREFIX}{name}.py"
    if not any(module.name == FILE_PREFIX + name for module in pkgutil.iter_modules(__path__)):
        raise _unknown_method(name)
    try:
        importlib.import_module(f"{__name__}.{FILE_PREFIX}{name}")
    except (Exception, SystemExit) as error:
        raise UserError(
            f"MODEL.NAME: cannot import {name!r}: {import_problem(error, file, __file__)}; correct the file"
        ) from error
    if name not in _METHODS:
        raise UserError(f"MODEL.NAME: {file} registers no method; write @register({name!r}) above its class")


def _unknown_method(name: str) -> UserError:
    """The error for a name that has no file, with the known names and the files that could not be imported."""
    problems, names = _import_all(), sorted(_METHODS)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    if "." in name:
        hint = "; a class outside this repository is named package.module:Class"
    broken = f" (cannot be imported: {'; '.join(problems)})" if problems else ""
    return UserError(f"MODEL.NAME: unknown method {name!r}, known are {', '.join(names)}{broken}{hint}")


def _imported(name: str) -> type[FewShotModel]:
    """The class that `package.module:Class` names."""
    module_name, _, class_name = name.partition(":")
    try:
        method = getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:
        problem = import_problem(error, module_name, __file__)
        is_missing = isinstance(error, ModuleNotFoundError)
        advice = "PYTHONPATH must name the folder that holds the package" if is_missing else "correct it"
        raise UserError(f"MODEL.NAME: cannot import {name!r} (package.module:Class): {problem}; {advice}") from error
    if fault := _fault(method):
        raise UserError(f"MODEL.NAME: {name!r} {fault}")
    return method


def _fault(method: Any) -> str:
    """What keeps an object from being a method, '' if nothing does."""
    if not (isinstance(method, type) and issubclass(method, FewShotModel)):
        return "is not a subclass of models.base.FewShotModel"
    if missing := sorted(method.__abstractmethods__):
        return f"has no {', '.join(missing)}; write what models.base.FewShotModel describes"
    if not (isinstance(method.Options, type) and issubclass(method.Options, ModelOptions)):
        return "has Options that are not a subclass of utils.schema.ModelOptions"
    return ""


def options_of(name: str) -> type[ModelOptions]:
    """The typed `MODEL` section that a method reads.

    Raises:
        UserError: no such method.
    """
    return method_class(name).Options


def build(method: str | ModelOptions, image_size: int = 224, **options: Any) -> FewShotModel:
    """Returns a method with its weights loaded, on the CPU.

    `build("clipspm", BACKBONE="tiny", CLIP_WEIGHTS="random", HSMR={"ENABLED": False})`

    Args:
        method: its name, or an instance of its options class.
        image_size: height and width of the frames in pixels.
        options: keys of the config's MODEL section; only with a name. The defaults are those of the method.

    Raises:
        UserError: unknown method, option or backbone, weights that cannot be loaded, or a backbone of the method's own
            with options that only the backbones of this package have.
    """
    if isinstance(method, str):
        method = config_from_dict({"MODEL": {**options, "NAME": method}}, f"models.build({method!r})").MODEL
    elif options:
        raise TypeError(f"options {', '.join(options)} go with the name of a method, not with an options object")
    model = method_class(method.NAME)(method, image_size)
    if not any(isinstance(module, FrameTower) for module in model.modules()):
        _refuse_own_backbone(method)
    model.data = DataOptions(IMG_SIZE=image_size, SHORT_SIDE=round(image_size * SHORT_SIDE_TO_CROP))
    return model


def load(path: str | Path, config: str | Path | None = None, overrides: Sequence[str] = ()) -> FewShotModel:
    """Returns the model of a checkpoint, ready to score: in evaluation mode, on the CPU.

    Args:
        path: a checkpoint of a training run, a converted one, or one that the released code saved.
        config: the YAML file to build the model with. A checkpoint of a training run holds its own; the others need it.
        overrides: `KEY=VALUE` over either of them, such as MODEL.CLIP_WEIGHTS=weights/RN50.pt.

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
    """Returns the config to use a checkpoint with; arguments and errors as in `load`."""
    if config is not None:
        return load_config(config, overrides).config
    if stored := load_checkpoint(Path(path)).get("config"):
        return config_from_dict(stored, str(path), overrides=overrides)
    raise UserError(
        f"{path}: holds weights but no config, as it was converted or saved by the released code; name the YAML "
        "file that it belongs to, such as configs/clipspm/released/hmdb51.yaml"
    )


def load_weights_from(path: Path, model: FewShotModel, config: Config) -> dict[str, Any]:
    """Loads the weights of a checkpoint, of this project or of the released code, into a model.

    Args:
        path: of the checkpoint; of several processes, the main one reads it.
        model: built from `config`.
        config: what the model is used with; where the weights do not fit, the message names the keys in which it
            differs from the config of the training run.

    Returns:
        the content of the checkpoint.

    Raises:
        UserError: no such file, or weights that do not fit.
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


def _refuse_own_backbone(options: ModelOptions) -> None:
    """A method that brings its own backbone would not notice these keys."""
    defaults = ModelOptions()
    for key in ("TRAINABLE", "ACTIVATION_CHECKPOINTING", "COMPILE"):
        if getattr(options, key) != getattr(defaults, key):
            raise UserError(
                f"MODEL.{key} is {getattr(options, key)}, which needs a backbone of models/, and {options.NAME} has "
                f"its own: set MODEL.{key} to its default"
            )
