"""What an operator takes beside its tensors: one NamedTuple each, whose fields are the schema's arguments, in order.

A number is a constant of a compiled graph, and a 0-dim tensor stays free to change without recompilation. A schema has
no type for "either", so each such argument is a pair, as ``threshold`` and ``threshold_t``: the second counts, unless
it is None. `numbers` has what counts.
"""

from __future__ import annotations

import typing
from typing import Any, NamedTuple

from torch import Tensor


class StepArguments(NamedTuple):
    """Of the anisotropic step, after z and score: see `fastanila.ops.anisotropic_step`."""

    threshold: float
    threshold_t: Tensor | None
    step_size: float
    step_size_t: Tensor | None
    noise_scale: float
    noise_scale_t: Tensor | None
    norm: str
    seed: int
    seed_t: Tensor | None
    step: int
    step_t: Tensor | None
    offset: int
    gamma: Tensor | None
    mask: Tensor | None
    bounds: tuple[float, float] | None

    def numbers(self) -> dict[str, Any]:
        return dict(
            threshold=chosen(self.threshold, self.threshold_t),
            step_size=chosen(self.step_size, self.step_size_t),
            noise_scale=chosen(self.noise_scale, self.noise_scale_t),
            seed=chosen(self.seed, self.seed_t),
            step=chosen(self.step, self.step_t),
        )


class MetropolisArguments(NamedTuple):
    """Of the Metropolis transition, after the state and the proposal: see `fastanila.ops.metropolis_step`."""

    threshold: float
    threshold_t: Tensor | None
    step_size: float
    step_size_t: Tensor | None
    norm: str
    seed: int
    seed_t: Tensor | None
    step: int
    step_t: Tensor | None
    offset: int
    mask: Tensor | None

    def numbers(self) -> dict[str, Any]:
        return dict(
            threshold=chosen(self.threshold, self.threshold_t),
            step_size=chosen(self.step_size, self.step_size_t),
            seed=chosen(self.seed, self.seed_t),
            step=chosen(self.step, self.step_t),
        )


class WholeChainArguments(NamedTuple):
    """Of a whole chain, after z and the energy's tensors: see `fastanila.ops.whole_chain`."""

    threshold: float
    threshold_t: Tensor | None
    step_size: float
    step_size_t: Tensor | None
    noise_scale: float
    noise_scale_t: Tensor | None
    seed: int
    seed_t: Tensor | None
    step: int
    step_t: Tensor | None
    steps: int
    offset: int
    chain_norm: bool
    frozen: bool
    bounds: tuple[float, float] | None
    adjusted: bool

    def numbers(self) -> dict[str, Any]:
        return dict(
            threshold=chosen(self.threshold, self.threshold_t),
            step_size=chosen(self.step_size, self.step_size_t),
            noise_scale=chosen(self.noise_scale, self.noise_scale_t),
            seed=chosen(self.seed, self.seed_t),
            step=chosen(self.step, self.step_t),
        )


def chosen(number, tensor):
    """What counts of a pair."""
    return number if tensor is None else tensor


def schema(arguments: type) -> str:
    """The fields of such a NamedTuple as torch's schemas write them: "float threshold, Tensor? threshold_t, ..."."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in typing.get_type_hints(arguments).items())


_TYPES = {
    bool: "bool",
    str: "str",
    float: "float",
    int: "SymInt",
    Tensor | None: "Tensor?",
    tuple[float, float] | None: "float[]?",
}
