"""The methods, by name.

A method registers itself with `@register("name")` in a file `models/model_<name>.py`; nothing else has to
be touched. A class outside this repository is named by its import path: `my_package.my_module:MyMethod`.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import TypeVar

from models.base import FewShotModel
from models.frame_tower import FrameTower
from utils.errors import UserError
from utils.schema import ModelOptions

_METHODS: dict[str, type[FewShotModel]] = {}
Method = TypeVar("Method", bound=type[FewShotModel])


def register(name: str) -> Callable[[Method], Method]:
    """Class decorator that makes a method available as `MODEL.NAME: <name>`.

    Raises:
        ValueError: two methods took the same name.
    """

    def add(method: Method) -> Method:
        known = _METHODS.setdefault(name, method)
        # A module that is imported a second time brings its own class again, and that is no clash.
        if (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
            raise ValueError(f"two methods are called {name!r}: {known.__module__} and {method.__module__}")
        _METHODS[name] = method
        return method

    return add


def available() -> list[str]:
    """Names of all methods in this package, sorted."""
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("model_"):
            importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_METHODS)


def method_class(name: str) -> type[FewShotModel]:
    """The class behind `MODEL.NAME`.

    Raises:
        UserError: no such method; the message lists the known ones.
    """
    if ":" in name:
        return _imported(name)
    names = available()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        if "." in name:
            hint = "; a class outside this repository is named package.module:Class"
        raise UserError(f"MODEL.NAME: unknown method {name!r}, known are {', '.join(names)}{hint}")
    return _METHODS[name]


def _imported(name: str) -> type[FewShotModel]:
    module_name, _, class_name = name.partition(":")
    try:
        method = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, SyntaxError, AttributeError, ValueError, TypeError) as error:  # the last: a relative name
        raise UserError(
            f"MODEL.NAME: cannot import {name!r} (package.module:Class): {error}; the environment variable PYTHONPATH "
            "must name the folder that holds the package"
        ) from error
    if not (isinstance(method, type) and issubclass(method, FewShotModel)):
        raise UserError(f"MODEL.NAME: {name!r} is not a subclass of models.base.FewShotModel")
    if missing := sorted(method.__abstractmethods__):
        raise UserError(f"MODEL.NAME: {name!r} lacks {', '.join(missing)}; write what models.base.FewShotModel says")
    return method


def options_of(name: str) -> type[ModelOptions]:
    """The typed `MODEL` section that a method reads.

    Raises:
        UserError: no such method.
    """
    return method_class(name).Options


def build(options: ModelOptions, image_size: int) -> FewShotModel:
    """The method that `options.NAME` names, with its weights loaded, on the CPU.

    Args:
        options: an instance of the method's own options class.
        image_size: height and width of the frames in pixels.

    Raises:
        UserError: unknown method or backbone, weights that cannot be had, or a backbone of the method's own where
            the options ask for what only those of this package can do.
    """
    model = method_class(options.NAME)(options, image_size)
    if not any(isinstance(module, FrameTower) for module in model.modules()):
        _refuse_own_backbone(options)
    return model


def _refuse_own_backbone(options: ModelOptions) -> None:
    """A method that brings its own backbone would not notice these keys."""
    defaults = ModelOptions()
    for key in ("TRAINABLE", "ACTIVATION_CHECKPOINTING", "COMPILE"):
        if getattr(options, key) != getattr(defaults, key):
            raise UserError(
                f"MODEL.{key} is {getattr(options, key)}, which needs a backbone of models/, and {options.NAME} has "
                f"its own: set MODEL.{key} to its default"
            )
