"""Checks of arguments: each raises ValueError (TypeError) naming the argument, what it was and what was expected."""

from __future__ import annotations

import math
import numbers

import torch


def count(name: str, value: int, least: int = 1) -> None:
    whole = type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))
    if not whole or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def number(name: str, value) -> None:
    if not isinstance(value, (float, int, numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def positive(name: str, value: float, finite: bool = False) -> None:
    number(name, value)
    if not value > 0 or (finite and value == math.inf):
        raise ValueError(f"{name} must be {'positive and finite' if finite else 'positive or inf'}, got {value}")


def nonnegative(name: str, value: float) -> None:
    number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def callables(**arguments) -> None:
    """Of arguments that may be None."""
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a callable, got {type(value).__name__}")


def bounds(name: str, bounds) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"{name} must be a pair (low, high), got {bounds!r}")
    try:
        low, high = float(bounds[0]), float(bounds[1])
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise ValueError(f"{name} must be a pair with low < high, got {bounds!r}")
    return low, high
