"""Lengths of windows and strides on the command line: 2s, 500ms or 16f."""

import argparse
import math
import re
from typing import Literal, NamedTuple

LENGTH = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(s|ms|f)")


class Length(NamedTuple):
    """The length of a window or a stride: `amount` seconds ("s") or frames ("f")."""

    amount: float
    unit: Literal["s", "f"]

    def __str__(self) -> str:
        return f"{self.amount:g}{self.unit}"


def length(text: str) -> Length:
    """Parses a length: 2s, 500ms or 16f."""
    match = LENGTH.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a length such as 2s, 500ms or 16f (frames), found {text!r}")
    amount, unit = float(match[1]), match[2]
    if not 0 < amount < math.inf:
        raise argparse.ArgumentTypeError(f"expected a length above 0, found {text!r}")
    if unit != "f":
        return Length(amount / 1000 if unit == "ms" else amount, "s")
    if not amount.is_integer():
        raise argparse.ArgumentTypeError(f"expected a whole number of frames, found {text!r}")
    return Length(amount, "f")
