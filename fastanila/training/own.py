"""An energy and data of the user's own, by a reference package.module:function, or given from Python.

A run's config.json holds the reference. What was given from Python cannot be found again: config.json then says "given:
Net", by the class's name. Python's import runs code: a reference is imported where the user gives one, or where a run
that has one is loaded, resumed or evaluated, and nowhere else.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_GIVEN = "given: "


def is_reference(name: str | None) -> bool:
    """Whether it is written as package.module:function."""
    return isinstance(name, str) and _REFERENCE.fullmatch(name) is not None


def is_given(name: str | None) -> bool:
    """Whether it is what config.json says of an object that was given from Python."""
    return isinstance(name, str) and name.startswith(_GIVEN)


def is_own(name: str | None) -> bool:
    return is_reference(name) or is_given(name)


def name_of(thing: Any) -> str:
    """What config.json says of an object that was given from Python."""
    return _GIVEN + type(thing).__name__


def folder(data: str) -> str:
    """The name of a run's folder for that data: a reference's function, or the class that was given."""
    return data.split(":")[-1].strip().split(".")[-1]


def not_found(setting: str, name: str, where: str) -> str:
    """What to say where something that was given from Python is needed again."""
    thing = "energy=module" if setting == "energy" else "data=..."
    kind = name.removeprefix(_GIVEN)
    return f"the {setting} of {where} was given from Python ({kind}) and cannot be found again: give it, {thing}"


def find(setting: str, reference: str) -> Callable:
    """The function that a reference names. Raises ValueError, in one line, where there is none."""
    module, _, path = reference.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            where = "Python looks in the current folder (with python -m), in PYTHONPATH and in what is installed"
            raise ValueError(f"{setting}: there is no module {error.name}, got {reference}; {where}") from error
        raise ValueError(f"{setting}: importing {module} failed: {described(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{setting}: {module} has no {path}, got {reference}")
        found = getattr(found, part)
    instance = hasattr(found, "state_dict") and not isinstance(found, type)
    if not callable(found) or instance:  # a module can be called, but each run needs one of its own
        returns = "an nn.Module" if setting == "energy" else "a data set"
        raise ValueError(f"{setting}: {reference} must be a function that returns {returns}, got {_kind(found)}")
    return found


def made(setting: str, reference: str, *arguments: Any) -> Any:
    """What the function of a reference returns. It is called with the arguments if it needs one, or none."""
    function = find(setting, reference)
    takes = arguments if arguments and _takes_shape(function) else ()
    try:
        return function(*takes)
    except Exception as error:  # whatever the user's function raises
        call = f"{reference}({', '.join(map(str, takes))})"
        raise ValueError(f"{setting}: {call} failed: {described(error)}") from error


def _takes_shape(function: Callable) -> bool:
    """Whether a function needs a positional argument, or has one called shape."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some builtins
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return bool(positional) and (positional[0].default is inspect.Parameter.empty or positional[0].name == "shape")


def described(error: BaseException) -> str:
    """An error in one line, with its type."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _kind(thing: Any) -> str:
    return thing.__name__ if isinstance(thing, type) else f"an object of type {type(thing).__name__}"
