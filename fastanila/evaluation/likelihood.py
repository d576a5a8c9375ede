"""The likelihood of held-out data under a model of any dimension, by annealing, with a bracket of what it can be.

The model is exp(-U) / Z, on the box of its states where they are confined to one. `annealing` estimates log Z from
below, from draws of a base, and from above, from chains that start at data and settle to the model's law. The first
needs nothing of the model's chains. The second holds as far as they have settled, which nothing here can prove; where
it comes out below the first they had not, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, noise
from ..models.score import sampling
from ..noise import Stream
from .annealing import Annealer
from .bases import Folded, Gaussian, Uniform
from .plane import spaced

ERRORS = 3  #: standard errors that a bracket has beyond its two estimates
_UNSETTLED = 2.5  #: standard errors of both that the upper estimate lies below the lower one: by chance once in 160
_LEAST_ESS = 20  #: chains' worth of weights below which a standard error means little
_WIDE, _WIDE_EACH = 1.0, 0.02  #: nats, and nats a dimension, of a bracket that still says something
_BATCH, _FITTED = 1024, 10_000  #: states whose energy is taken at a time, and the most that a base is fitted to


class Estimate(NamedTuple):
    """The logarithm of a mean weight."""

    value: float  #: nats
    stderr: float  #: by the delta method, over the chains, which are independent
    ess: float  #: (sum w)^2 / sum w^2, of as many chains


def log_mean(log_weights: Tensor) -> Estimate:
    """Of log weights (B,), float64, B >= 2."""
    count = len(log_weights)
    log_total = torch.logsumexp(log_weights, 0)
    shares = (log_weights - log_total).exp() * count  # of mean 1
    return Estimate(
        (log_total - math.log(count)).item(),
        (shares.std() / math.sqrt(count)).item(),
        (count / shares.square().mean()).item(),
    )


class Bracket(NamedTuple):
    """log Z from both sides; nats."""

    forward: Estimate  #: from the base: its mean exponential is unbiased for Z, so that it is low rather than high
    reverse: Estimate  #: from the model: high rather than low, if its starts have the model's law
    acceptance: float  #: the mean over both ways
    gradients: int  #: of the energy, a chain: both ways, and what the reverse's starts took to settle

    @property
    def lower(self) -> float:
        return self.forward.value - ERRORS * self.forward.stderr

    @property
    def upper(self) -> float:
        return self.reverse.value + ERRORS * self.reverse.stderr

    def note(self, dimension: int) -> str | None:
        """One sentence where the bracket means nothing."""
        wide, width = max(_WIDE, _WIDE_EACH * dimension), self.upper - self.lower
        if not all(math.isfinite(x) for x in (self.lower, self.upper)):
            return "a weight is not finite: the energy has no law that the base leads to, and nothing here counts"
        below = self.forward.value - self.reverse.value
        if below > _UNSETTLED * math.hypot(self.forward.stderr, self.reverse.stderr) or width < 0:
            return (
                f"the upper estimate lies {below:.3g} nats below the lower one: the chains that it is from had not "
                "settled to the model's law, so it bounds nothing; the lower one stands"
            )
        if width > wide:
            return f"the bracket is {width:.3g} nats wide, which says nothing of this model: take more temperatures"
        if (least := min(self.forward.ess, self.reverse.ess)) < _LEAST_ESS:
            return (
                f"the weights are those of {least:.3g} chains, of which no standard error can be taken: take more "
                "temperatures or more chains"
            )
        return None


def bracket(
    energy: Callable[[Tensor], Tensor],
    sampler: Any,
    base: Uniform | Gaussian,
    starts: Tensor,
    *,
    box: tuple[float, float] | None = None,
    temperatures: int = 1000,
    settle: int = 1000,
    seed: int = 0,
    step: int = 0,
    compile: bool = True,
) -> Bracket:
    """log Z of exp(-U) from both sides, by as many chains each way as there are starts.

    Args:
        energy: any callable (B, ...) -> (B,).
        sampler: an exact one; `annealing.Annealer.pilot` adapts its step size to every temperature.
        base: a law that covers the model's, on ``box`` if there is one.
        starts: (B, ...), B >= 2, where chains begin that are to have the model's law.
        box: (low, high) of every element, where the model is confined to one; Z is then the integral over it.
        temperatures: at which a chain is weighed, each way, with one transition between two of them.
        settle: transitions that the starts make first; 0 where they are exact draws of the model.
        seed: names the noise.
        step: the first of the transitions' steps.

    Raises ValueError for a sampler that is not exact, and for an energy that no path from the base leads to.
    """
    for name, value, least in (("temperatures", temperatures, 2), ("settle", settle, 0), ("starts", len(starts), 2)):
        checks.count(name, value, least=least)
    energy = energy if box is None else Folded(energy, box)
    work = Annealer(energy, base, sampler, seed=seed, step=step, compile=compile)
    schedule = work.pilot(len(starts), temperatures)
    up = work.anneal(base.draw(len(starts), seed=seed, step=work.drawn()), schedule, up=True)
    down = work.anneal(work.settle(starts, schedule, settle), schedule, up=False)
    high = log_mean(down.log_weights)
    return Bracket(
        log_mean(up.log_weights),
        high._replace(value=-high.value),
        0.5 * (up.acceptance + down.acceptance),
        (2 * temperatures + settle) * sampler.gradients,
    )


def dequantised(pixels: Tensor, *, seed: int, step: int) -> Tensor:
    """Pixels, uint8, as float32 in [-1, 1]: (pixel + u) / 128 - 1, u uniform on its grey level (Theis et al. 2016)."""
    u = noise.uniform(pixels.shape, seed=seed, step=step, stream=Stream.ANNEALING, device=pixels.device)
    return (pixels.float() + u) * (1 / 128) - 1


def bits(nll: float, dimension: int) -> float:
    """Bits a dimension of 8-bit pixels, of the nats of `dequantised` ones: each level is 1 / 128 wide."""
    return nll / (dimension * math.log(2)) + 7


def evaluate(
    energy: Callable[[Tensor], Tensor],
    sampler: Any,
    train: Tensor,
    held_out: Tensor,
    *,
    base: Uniform | Gaussian | None = None,
    box: tuple[float, float] | None = None,
    pixels: bool = False,
    chains: int = 256,
    temperatures: int = 1000,
    settle: int = 1000,
    seed: int = 0,
    step: int = 0,
    compile: bool = True,
) -> dict[str, Any]:
    """The likelihood of held-out data (M, ...) under exp(-U) / Z, in nats.

    log_z, log_z_stderr and ess_forward: of chains from the base; log_z_reverse, ess_reverse: of chains that start at
    training data (N, ...) and settle. log_z_lower, log_z_upper: the bracket, each estimate less or plus three standard
    errors. nll = mean U + log Z; nll_stderr: of both, the data's by how many there are; nll_lower, nll_upper: by the
    bracket alone, for these very data. With ``pixels`` (uint8, of which these are `dequantised`) bits_per_dimension,
    ..._lower and ..._upper: an upper bound of what the pixels themselves take (`bits`). note: one sentence, where all
    that means nothing.

    The base is by default uniform on ``box``, or a Gaussian fitted to the training data where there is none. Other
    arguments as of `bracket`.
    """
    checks.count("chains", chains, least=2)
    if base is None:
        within = None if box is None else Uniform(train.shape[1:], box, train.device)
        base = Gaussian.fitted(spaced(train, _FITTED)) if within is None else within
    stream = Stream.ANNEALING
    rows = noise.integers(len(train), (chains,), seed=seed, step=1 << 32, stream=stream, device=train.device)
    found = bracket(
        energy, sampler, base, train[rows], box=box, temperatures=temperatures, settle=settle, seed=seed, step=step,
        compile=compile,
    )  # fmt: skip
    with torch.no_grad(), sampling(energy):
        u = torch.cat([energy(part).double() for part in held_out.split(_BATCH)])
    mean, dimension = u.mean().item(), held_out[0].numel()
    forward, reverse = found.forward, found.reverse
    report: dict[str, Any] = {
        "log_z": forward.value,
        "log_z_stderr": forward.stderr,
        "log_z_reverse": reverse.value,
        "log_z_reverse_stderr": reverse.stderr,
        "log_z_lower": found.lower,
        "log_z_upper": found.upper,
        "nll": mean + forward.value,
        "nll_stderr": math.hypot(forward.stderr, u.std().item() / math.sqrt(len(u))),
        "nll_lower": mean + found.lower,
        "nll_upper": mean + found.upper,
    }
    if pixels:
        for name in ("nll", "nll_lower", "nll_upper"):
            report[name.replace("nll", "bits_per_dimension")] = bits(report[name], dimension)
    return report | {
        "ess_forward": forward.ess,
        "ess_reverse": reverse.ess,
        "acceptance": found.acceptance,
        "chains": chains,
        "temperatures": temperatures,
        "gradients": found.gradients,
        "note": found.note(dimension),
    }
