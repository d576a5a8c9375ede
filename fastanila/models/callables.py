"""What a callable refers to, as far as Python shows it: the modules that it may call, and what tells it from others."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

_DEEPEST = 8  #: parts of parts of ... of a callable that are looked at,
_MOST = 1000  #: how many of them in all,
_LARGEST = 100  #: and the entries of the largest list or dict

#: The names by which code reaches globals and attributes.
Names = frozenset[str]
_CALLED: Names = frozenset({"forward", "__call__"})


def modules(function: Any) -> list[nn.Module]:
    """The modules that a callable is or refers to, with all within them, each once.

    A callable refers to what it is bound to, what a functools.partial gives it, what it closes over, its default
    arguments, and the globals and attributes that its code names; and so do the functions among these. Not found is
    what code reaches in other ways: by a name that it puts together, or as the result of a call.
    """
    found: dict[int, nn.Module] = {}
    for part in _parts(function):
        if isinstance(part, nn.Module):
            found |= {id(m): m for m in part.modules()}
    return list(found.values())


def _parts(function: Any) -> Iterator[Any]:
    """The callable, its parts, and theirs, nearest first."""
    seen: dict[tuple[int, Names], Any] = {}  # with the parts, lest another gets the id of one that is gone
    layer = [(function, _CALLED)]
    for _ in range(_DEEPEST):
        below: list[tuple[Any, Names]] = []
        for part, names in layer:
            if (id(part), names) not in seen and len(seen) < _MOST:
                seen[id(part), names] = part
                yield part
                below += _within(part, names)
        layer = below


def _within(part: Any, names: Names) -> list[tuple[Any, Names]]:
    """The parts of one part, each with the names that the code which reaches it uses; ``names`` are those of ``part``,
    without which all attributes of an object, and all of an imported module, would be its parts."""
    if isinstance(part, types.FunctionType):
        names = _names(part.__code__)
        used = [*_contents(part), *part.__dict__.values()]
        if not _is_of_torch(part.__module__):
            used += [part.__globals__[name] for name in names if name in part.__globals__]
    elif isinstance(part, types.MethodType):
        function = part.__func__
        names = _names(function.__code__) if isinstance(function, types.FunctionType) else names
        used = [function, part.__self__]
    elif isinstance(part, functools.partial):
        used = [part.func, *part.args, *part.keywords.values()]
    elif isinstance(part, weakref.ref):
        used = [part()]
    elif isinstance(part, (dict, tuple, list, set, frozenset)):
        values = part.values() if isinstance(part, dict) else part
        used = list(values) if len(part) <= _LARGEST else []
    elif isinstance(part, types.ModuleType):
        own = {} if _is_of_torch(part.__name__) else vars(part)
        used = [own[n] for n in names if isinstance(own.get(n), (nn.Module, types.FunctionType))]
    elif isinstance(part, (Tensor, type)) or _is_of_torch(type(part).__module__):
        used = []
    else:
        used = _attributes(part, names)
    return [(x, names) for x in used]


def _attributes(part: Any, names: Names) -> list[Any]:
    """The attributes of an object by these names; of methods and properties, the method."""
    own = getattr(part, "__dict__", {})
    found = [own["__wrapped__"]] if "__wrapped__" in own else []
    for name in names:
        of_class = getattr(type(part), name, None)
        method = of_class.fget if isinstance(of_class, property) else of_class
        method = method.func if isinstance(method, functools.cached_property) else method
        if name in own:
            found.append(own[name])
        elif isinstance(method, types.FunctionType) and not _is_of_torch(method.__module__):
            found.append(types.MethodType(method, part))
        elif isinstance(of_class, nn.Module):
            found.append(of_class)
        elif isinstance(of_class, types.MemberDescriptorType) and hasattr(part, name):  # of __slots__
            found.append(getattr(part, name))
    return found


def _contents(function: types.FunctionType) -> list[Any]:
    """What a function closes over, and its default arguments."""
    cells = [_content(cell) for cell in function.__closure__ or ()]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _names(code: types.CodeType) -> Names:
    """The names of globals and attributes in a code, and in those of the functions that it makes."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _is_of_torch(name: str | None) -> bool:
    return (name or "").split(".")[0] == "torch"


# ----------------------------------------------------------------------------------------------- which callable it is


class Identity(NamedTuple):
    """What tells a callable from others. Equal keys: the same code on the same parts, but for the values of tensors."""

    key: tuple  #: hashable, and keeps nothing alive: of a part that is no plain value it has the id
    tensors: tuple[int, ...]  #: the ids of the tensors that it closes over or was given
    owners: list  #: the objects that the key has the ids of, which mean nothing any more once these are gone


def identity(function: Any) -> Identity:
    """Of a callable, or of a tuple of some. Functions are known by their code and what they close over, so that a
    lambda that is made anew is the same."""
    tensors: list[int] = []
    owners: list[Any] = []

    def key(x: Any, depth: int = 0) -> tuple:
        def keys(parts) -> tuple:
            return tuple(key(part, depth + 1) for part in parts)

        if x is None or type(x) in (bool, int, float, complex, str, bytes):
            return type(x), x
        if isinstance(x, Tensor):
            tensors.append(id(x))
            return (Tensor,)
        if depth < _DEEPEST:
            if isinstance(x, types.FunctionType):
                owners.append(x.__code__)
                return id(x.__code__), id(x.__globals__), *keys(_contents(x))
            if isinstance(x, types.MethodType):
                return keys((x.__func__, x.__self__))
            if isinstance(x, functools.partial):
                return functools.partial, tuple(x.keywords), *keys((x.func, *x.args, *x.keywords.values()))
            if type(x) in (tuple, list) and len(x) <= _LARGEST:
                return type(x), *keys(x)
        owners.append(x)
        return (id(x),)

    return Identity(key(function), tuple(tensors), owners)
