"""Reports the requirements that this interpreter does not meet; exit code 0 if it meets all, otherwise 1.

    python run/requirements.py requirements.txt tests/requirements.txt

It runs before anything is installed, so it uses only the standard library, and reads only the syntax of our files:
`name>=version`, comments, and after a semicolon the machines that need the package.
"""

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def missing(files: list[str], with_optional: bool = True) -> list[str]:
    """Returns a sentence about each requirement that is not met.

    Args:
        files: the requirement files.
        with_optional: whether to include packages that only some machines need, and that the program can run without.
    """
    lines = [line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    texts = [line.partition("#")[0].strip() for line in lines]
    return [problem for text in texts if text and (problem := _problem(text, with_optional))]


def _problem(text: str, with_optional: bool) -> str:
    requirement, _, condition = text.partition(";")
    name, _, minimum = requirement.strip().partition(">=")
    if condition and not (with_optional and f'"{platform.machine()}"' in condition):
        return ""
    try:
        installed = version(name)
    except PackageNotFoundError:
        return f"{name} is not installed"
    return f"{name} {installed} is older than {minimum}" if _numbers(installed) < _numbers(minimum) else ""


def _numbers(version_text: str) -> list[int]:
    """Parses the numbers of a version: 2.15.0+cpu -> [2, 15, 0]."""
    return [int(number) for number in re.findall(r"\d+", version_text.partition("+")[0])]


if __name__ == "__main__":
    sentences = missing(sys.argv[1:])
    print("\n".join(sentences), end="\n" if sentences else "", file=sys.stderr)
    sys.exit(1 if sentences else 0)
