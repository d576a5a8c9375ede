"""Which flags a command line gives."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def flags(argv: Iterable[str], names: Iterable[str]) -> set[str]:
    """Which of the settings a command line gives, as --name, --name=value or --no-name."""
    words = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    return {name for name in names if name in words or f"no_{name}" in words}


def given(parser: argparse.ArgumentParser, argv: list[str] | None, arguments: argparse.Namespace) -> set[str]:
    """Which arguments a command line gives, rather than leaves at their defaults."""
    absent = object()
    marked = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(arguments), absent)))
    return {name for name, value in vars(marked).items() if value is not absent}


def refuse(present: set[str], names: Iterable[str], why: str) -> None:
    """Raise ValueError naming the first of the arguments ``names`` that is present, and ``why`` it has no effect."""
    for name in names:
        if name in present:
            raise ValueError(f"{name} has no effect {why}")
