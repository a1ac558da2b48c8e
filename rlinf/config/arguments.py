"""Types of numbers on the command line: argparse refuses a number out of range with a message that names the option, the value and the
range."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from low to high."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from {low} to {high}")
        return int(text)

    return read


def tolerance(text: str) -> float:
    """The type of an argument that is a relative difference."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no finite number from 0, such as 1e-5")
    return value
