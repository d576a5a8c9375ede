"""Checks the operators share: each raises ValueError (TypeError) naming an argument, what it was, what was expected.

Numbers and the noise's name come back as the operators take them: a number is a constant of a compiled graph and a
0-dim tensor stays free to change, so a schema has a pair for each. Values inside tensors are not read.
"""

from __future__ import annotations

import functools
import numbers

import torch
from torch import Tensor

from .. import checks, noise
from . import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_chains(z) -> None:
    check_tensor("z", z)
    if z.dtype not in DTYPES:
        raise TypeError(f"z must be float32, bfloat16 or float16, got {z.dtype}")
    if z.dim() == 0:
        raise ValueError("z must have a dimension of chains, (B, ...), got a 0-dim tensor")


def check_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_alike(name: str, value, z: Tensor) -> None:
    """A tensor of z's dtype, shape and device."""
    check_tensor(name, value)
    if value.dtype != z.dtype:
        raise TypeError(f"{name} must have z's dtype {z.dtype}, got {value.dtype}")
    if value.shape != z.shape:
        raise ValueError(f"{name} must have z's shape {tuple(z.shape)}, got {tuple(value.shape)}")
    check_device(name, value, z)


def check_norm(norm, z: Tensor) -> None:
    if norm not in reference.NORMS:
        raise ValueError(f"norm must be one of {', '.join(reference.NORMS)}, got {norm!r}")
    if norm == "channel" and z.dim() < 2:
        raise ValueError(f"norm='channel' needs z of at least two dimensions, got shape {tuple(z.shape)}")


def check_mask(mask, z: Tensor) -> None:
    if mask is None:
        return
    check_broadcast("mask", mask, z)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")


def check_broadcast(name: str, value, z: Tensor) -> None:
    check_tensor(name, value)
    check_device(name, value, z)
    fits = value.dim() <= z.dim() and all(
        have in (1, want) for have, want in zip(value.shape[::-1], z.shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to z's shape {tuple(z.shape)}, got {tuple(value.shape)}")


def check_device(name: str, value: Tensor, z: Tensor) -> None:
    if value.device != z.device:
        raise ValueError(f"{name} must be on z's device {z.device}, got {value.device}")


def as_threshold(value, z: Tensor) -> tuple[float, Tensor | None]:
    return _checked_number("threshold", value, z, checks.positive)


def as_step_size(value, z: Tensor) -> tuple[float, Tensor | None]:
    return _checked_number("step_size", value, z, _positive_and_finite)


def as_noise_scale(value, z: Tensor) -> tuple[float, Tensor | None]:
    return _checked_number("noise_scale", value, z, checks.nonnegative)


def as_seed(value, z: Tensor) -> tuple[int, Tensor | None]:
    """Taken mod 2^64, as the schema's signed integer."""
    seed, tensor = _integer("seed", value, z)
    if tensor is None and (seed >= 1 << 63 or seed < -(1 << 63)):
        seed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    return seed, tensor


def as_step(value, z: Tensor, steps: int | None = None) -> tuple[int, Tensor | None]:
    """In [0, 2^56); with ``steps``, the first of so many."""
    step, tensor = _integer("step", value, z)
    if tensor is None and not 0 <= step <= noise.MAX_STEP - (steps or 1):
        must = "be in [0, 2**56)" if steps is None else f"be at least 0 and leave room for {steps} steps below 2**56"
        raise ValueError(f"step must {must}, got {step}")
    return step, tensor


def check_offset(offset) -> None:
    if isinstance(offset, Tensor) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"offset must be an int, got {type(offset).__name__}")
    if offset < 0:
        raise ValueError(f"offset must be at least 0, got {offset}")


_positive_and_finite = functools.partial(checks.positive, finite=True)


def _checked_number(name: str, value, z: Tensor, check) -> tuple[float, Tensor | None]:
    number, tensor = _number(name, value, z)
    if tensor is None:
        check(name, number)
    return number, tensor


def _number(name: str, value, z: Tensor) -> tuple[float, Tensor | None]:
    """A float argument as the pair (number, tensor) of the schema."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise TypeError(f"{name} must be a number or a 0-dim floating tensor, got {_describe(value)}")
        check_device(name, value, z)
        return 1.0, value.detach()
    if type(value) is float or isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value, None
    if isinstance(value, numbers.Real):
        return float(value), None
    raise TypeError(f"{name} must be a number or a 0-dim floating tensor, got {type(value).__name__}")


def _integer(name: str, value, z: Tensor) -> tuple[int, Tensor | None]:
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype != torch.int64:
            raise TypeError(f"{name} must be an int or a 0-dim int64 tensor, got {_describe(value)}")
        check_device(name, value, z)
        return 0, value
    if isinstance(value, (int, torch.SymInt)):
        return value, None
    if isinstance(value, numbers.Integral):
        return int(value), None
    raise TypeError(f"{name} must be an int or a 0-dim int64 tensor, got {type(value).__name__}")


def _describe(value: Tensor) -> str:
    return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
