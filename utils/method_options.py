"""Names and options of the methods, read from the files in models/ without PyTorch, whose import takes seconds."""

import ast
import difflib
import functools
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.schema import ModelOptions

MODELS = Path(__file__).resolve().parent.parent / "models"
FILE_PREFIX = "model_"  # prefix of the files that contain a method
LIGHT_PACKAGES = sys.stdlib_module_names | {"pydantic", "utils"}
DEFINITIONS = (ast.Assign, ast.AnnAssign, ast.ClassDef, ast.FunctionDef)


def method_names() -> list[str]:
    """Returns the sorted names of all methods in models/."""
    return sorted(path.stem.removeprefix(FILE_PREFIX) for path in MODELS.glob(f"{FILE_PREFIX}*.py"))


def raise_if_unknown(method: str) -> None:
    """Raises UserError, with the known methods, if a method has no file in models/."""
    names = method_names()
    if method in names:
        return
    close = difflib.get_close_matches(method.casefold(), names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    if "." in method:
        hint = "; a class outside this repository is named package.module:Class"
    raise UserError(f"MODEL.NAME: unknown method {method!r}, known are {', '.join(names)}{hint}")


def options_without_torch(method: str) -> type[ModelOptions] | None:
    """Returns a copy of the class `Options` of a method in models/, which finds the mistakes in a config.

    Only the statements that need no other package are executed, in the file of the method and in those that it imports
    from. So the class is not the one that the method itself has. Returns None if this is not enough to define it.
    """
    module = f"models.{FILE_PREFIX}{method}"
    try:
        return _definitions(module)[_name_of_options(_parse(module))]
    except Exception:  # the import of the file will report its faults
        return None


def _parse(module: str) -> ast.Module:
    return ast.parse((MODELS.parent / module.replace(".", "/")).with_suffix(".py").read_bytes())


def _name_of_options(tree: ast.Module) -> str:
    """Returns X of the line `Options = X` in a class; the last one, if there are several."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    lines: list[Any] = [line for node in classes for line in node.body if isinstance(line, ast.Assign)]
    return [line.value.id for line in lines if ast.unparse(line.targets[0]) == "Options"][-1]


@functools.cache
def _definitions(module: str) -> dict[str, Any]:
    """Returns the names that a module of models/ defines without other packages than `LIGHT_PACKAGES`."""
    names: dict[str, Any] = {"__name__": module}
    for statement in _parse(module).body:
        if isinstance(statement, ast.ImportFrom) and str(statement.module).startswith("models."):
            found = _definitions(str(statement.module))
            names |= {alias.asname or alias.name: found[alias.name] for alias in statement.names if alias.name in found}
        elif isinstance(statement, DEFINITIONS) or _is_light_import(statement):
            _execute(statement, names)
    return names


def _is_light_import(statement: ast.stmt) -> bool:
    """Returns whether a statement only imports loaded modules of `LIGHT_PACKAGES`."""
    if isinstance(statement, ast.ImportFrom):
        modules = [str(statement.module)]
    elif isinstance(statement, ast.Import):
        modules = [alias.name for alias in statement.names]
    else:
        return False
    return all(module in sys.modules and module.partition(".")[0] in LIGHT_PACKAGES for module in modules)


def _execute(statement: ast.stmt, names: dict[str, Any]) -> None:
    """Adds what a statement defines to the names of its module, unless it needs a name that is not defined."""
    for function in ast.walk(statement):
        if isinstance(function, ast.FunctionDef):  # its annotations may name classes of PyTorch
            function.returns = None
            for argument in ast.walk(function.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
    with suppress(NameError):
        exec(compile(ast.Module([statement], []), names["__name__"], "exec"), names)
