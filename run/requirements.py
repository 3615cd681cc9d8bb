"""Tells whether this interpreter has what requirement files ask for; exit code 0 if so, 1 if not.

    python run/requirements.py requirements.txt tests/requirements.txt

Runs before anything is installed, so it uses the standard library alone, and it understands only what our
own files contain: `name>=version`, comments, and a condition on the machine after a semicolon.
"""

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version

LINE = re.compile(r"^(?P<name>[A-Za-z0-9_.-]+)>=(?P<least>[0-9.]+)\s*(;(?P<condition>.*))?$")


def missing(files: list[str], with_optional: bool = True) -> list[str]:
    """Returns a sentence about each requirement that is not met.

    Args:
        files: the requirement files.
        with_optional: includes packages that only some machines need; the program runs without them.

    Raises:
        ValueError: a line of another form.
    """
    problems = []
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                text = line.split("#")[0].strip()
                problem = _problem(text, with_optional) if text else None
                if problem:
                    problems.append(problem)
    return problems


def _problem(text: str, with_optional: bool) -> str | None:
    match = LINE.match(text)
    if match is None:
        raise ValueError(f"cannot read the requirement {text!r}")
    if match["condition"] and not (with_optional and f'"{platform.machine()}"' in match["condition"]):
        return None
    try:
        found = version(match["name"])
    except PackageNotFoundError:
        return f"{match['name']} is not installed"
    if _numbers(found) < _numbers(match["least"]):
        return f"{match['name']} {found} is older than {match['least']}"
    return None


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.15.0+cpu -> (2, 15, 0)."""
    return tuple(int(part) for part in re.match(r"[0-9.]*", text)[0].strip(".").split("."))  # type: ignore[index]


if __name__ == "__main__":
    sentences = missing(sys.argv[1:])
    print("\n".join(sentences), end="\n" if sentences else "", file=sys.stderr)
    sys.exit(1 if sentences else 0)
