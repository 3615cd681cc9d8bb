"""Reads an experiment file and the files that it extends."""

import os
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.yaml_text import read_yaml_file

EXTENDS = "EXTENDS"


def read_experiment(path: Path, extended_by: tuple[Path, ...] = ()) -> list[tuple[str, dict[Any, Any]]]:
    """Returns the name and the content of each file of an experiment, in rising precedence.

    The key EXTENDS of a file names one or more other files, relative to its folder; later ones take precedence over
    earlier ones, and the file itself over all of them.

    Args:
        path: the experiment file.
        extended_by: the chain of files that extend this one.

    Raises:
        UserError: a file is unreadable or not a mapping, or EXTENDS is circular or neither a file nor a list of files.
    """
    content = read_yaml_file(path, str(path))
    names = content.pop(EXTENDS, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{EXTENDS} in {path}: expected a file or a list of files, found {names!r}.")
    chain = (*extended_by, path)
    files = []
    for name in names:
        other = Path(os.path.normpath(path.parent / name))
        if not other.is_file():
            raise UserError(
                f"{EXTENDS} in {path}: no such file: {other}; name it relative to the folder of {path.name}."
            )
        if any(other.samefile(earlier) for earlier in chain):
            raise UserError(f"{EXTENDS} in {path}: {other} extends this file in turn; remove one of the two EXTENDS.")
        files += read_experiment(other, chain)
    return [*files, (str(path), content)]
