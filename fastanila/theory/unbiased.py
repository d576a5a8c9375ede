"""Means under the model without bias, by pairs of chains that meet: a likelihood gradient that no K is too short for.

Of lagged pairs (`theory.coupling`) and a function h, with X_t = Y_(t - lag) from the meeting on,

    H_l = h(X_l) + sum over j >= 1 of ( h(X_(l + j lag)) - h(Y_(l + (j - 1) lag)) )

has the mean of h under the chain's stationary law, for every l (Glynn and Rhee 2014; Jacob, O'Leary and Atchade 2020;
with a lag: Vanetti and Doucet 2020). The sum ends at the meeting. Here it is averaged over several l, and written as
states with weights of both signs, so that it serves for every h. With h = the gradient of U in the parameters it is
what learns an energy without bias (Qiu, Zhang and Wang 2020, for restricted Boltzmann machines).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from .coupling import Exact, lagged

_BATCH = 4096  #: states whose energies are differentiated at a time


class Weighted(NamedTuple):
    """States whose weights of both signs sum to 1 for every pair: a mean by them has no bias."""

    z: Tensor  #: (N, ...)
    weight: Tensor  #: (N,) float64
    pair: Tensor  #: (N,) int64, which pair each is of
    pairs: int
    gradients: int  #: scores that the chains took, all pairs together
    ends: Tensor  #: (B, ...) X at the last of the l's


def weighted(
    sampler: Exact,
    energy: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    at: Sequence[int],
    lag: int,
    budget: int,
    seed: int,
    step: int = 0,
) -> Weighted:
    """The states of the mean of H_l over the l's ``at``, for each of B pairs from x and y (B, ...).

    For the other arguments see `coupling.lagged`. Cost: a gradient of U for each transition of a chain, and of a pair
    that has met for each of both at once. Raises ValueError where a pair has not met within ``budget`` transitions:
    leaving it out would be a bias.
    """
    for number in at:
        checks.count("at", number, least=0)
    if not at or len(set(at)) != len(at) or max(at) > budget:
        raise ValueError(f"at must be different times up to the budget of {budget}, got {list(at)}")
    taken = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal taken
        taken += len(z)
        return energy(z)

    parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(z: Tensor, weight: float, rows: Tensor) -> None:
        parts.append((z, z.new_full((len(z),), weight, dtype=torch.float64), rows))

    ends, late = x, 0
    for moment in lagged(sampler, counted, x, y, lag=lag, budget=budget, seed=seed, step=step, least=max(at)):
        t, apart = moment.t, ~moment.met
        if t in at:
            add(moment.x, 1 / len(at), moment.rows)
            ends = moment.x  # of all pairs, which go on to the last
        weight = sum(t > number and (t - number) % lag == 0 for number in at) / len(at)
        if weight and moment.y is not None:
            add(moment.x[apart], weight, moment.rows[apart])
            add(moment.y[apart], -weight, moment.rows[apart])
        late = int(apart.sum())
    if late:
        raise ValueError(f"budget must be long enough for all pairs to meet, and {late} of {len(x)} had not within "
                         f"{budget} transitions: without them the mean has a bias")  # fmt: skip
    states, weights, rows = (torch.cat(column) for column in zip(*parts, strict=True))
    return Weighted(states, weights, rows, len(x), taken, ends)


def single(found: Weighted) -> Weighted:
    """One state a pair with weight 1, X at the last l: an exact draw but for what is left of the start."""
    z = found.ends
    return found._replace(
        z=z, weight=z.new_ones(len(z), dtype=torch.float64), pair=torch.arange(len(z), device=z.device)
    )


class Gradient(NamedTuple):
    """Of the mean log likelihood of data in the parameters, P numbers."""

    groups: Tensor  #: (G, P) float64, one estimate for each group of pairs, independent of one another
    variance: float  #: of one pair's estimate, the sum over the P parameters

    @property
    def mean(self) -> Tensor:
        return self.groups.mean(0)

    @property
    def error(self) -> Tensor:
        """(P,) the standard error of the mean."""
        return self.groups.std(0) / len(self.groups) ** 0.5


def likelihood_gradient(energy: nn.Module, data: Tensor | None, found: Weighted, *, groups: int = 16) -> Gradient:
    """Minus the mean gradient of U over data (N, ...), plus its mean under the model by ``found``: without bias.

    data: None gives the mean under the model alone, whose variance is the same. The pairs are divided into ``groups``
    of one size, at least 2. Raises ValueError where they cannot be, and for an energy without parameters.
    """
    checks.count("groups", groups, least=2)
    if found.pairs % groups:
        raise ValueError(f"groups must divide the {found.pairs} pairs, got {groups}")
    parameters = [p for p in energy.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("energy must have parameters to be differentiated in, got one without")
    each = found.pairs // groups
    on_data: Tensor | float = 0.0
    if data is not None:
        on_data = _summed(energy, parameters, data, torch.full_like(data.flatten(1)[:, 0], 1 / len(data)))
    estimates = []
    for group in range(groups):
        own = found.pair // each == group
        estimates.append(_summed(energy, parameters, found.z[own], found.weight[own] / each) - on_data)
    made = torch.stack(estimates)
    return Gradient(made, float(made.var(0).sum()) * each)


def _summed(energy: nn.Module, parameters: Sequence[Tensor], z: Tensor, weight: Tensor) -> Tensor:
    """(P,) float64: the sum of weight times the gradient of U at each state."""
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=z.device)
    for states, own in zip(z.split(_BATCH), weight.split(_BATCH), strict=True):
        with torch.enable_grad():
            u = energy(states)
            found = torch.autograd.grad((u * own.to(u.dtype)).sum(), parameters, allow_unused=True)
        total += torch.cat([
            (torch.zeros_like(p) if g is None else g).double().flatten() for p, g in zip(parameters, found, strict=True)
        ])  # fmt: skip
    return total
