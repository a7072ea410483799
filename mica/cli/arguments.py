"""What the commands' arguments have in common."""

import argparse
import math


def number(kind: type, low: float, high: float = math.inf, *, low_allowed: bool = False):
    """An argparse type: a number of ``kind`` above ``low`` (or at it) and below ``high``."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low < value < high or (low_allowed and value == low):
            return value
        bounds = f"{'at least' if low_allowed else 'above'} {low}"
        bounds += f" and below {high}" if high < math.inf else ""
        noun = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {noun} {bounds}, not '{text}'")

    return parse
