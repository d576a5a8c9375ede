"""Samplers: frozen settings, a pure transition, and a loop over it.

Each sampler is a frozen dataclass with

    init(evaluate, z) -> State                                     what a chain carries from transition to transition
    transition(evaluate, state, *, seed, step, ...) -> (State, Info)
    run(energy, z, *, steps, seed, step=0, ...) -> z               transitions step, step + 1, ..., step + steps - 1

where ``evaluate`` maps z (B, ...) to (energy (B,), score (B, ...)) with score = -grad U. Their number-valued settings
may be 0-dim tensors, which a compiled transition takes without recompiling. ``is_exact`` says whether the law of the
chain converges to exp(-U) itself; where it is False, the docstring says what law it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import checks, noise, ops, reference
from .energies import Evaluate, evaluator, sampling
from .transitions import Info, State, chain_of


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What all samplers share. Use a subclass."""

    is_exact: ClassVar[bool]
    #: whose magnitude |s| is, and when the gain is taken: see `AniLA`, where they are fields, which is why they have no
    #: annotation here: a dataclass would put them ahead of the others
    norm = "element"
    refresh = "transition"
    #: whether a transition is an anisotropic step without correction, which the whole-chain kernels can make
    is_unadjusted: ClassVar[bool] = False
    #: settings that change freely under a compiled transition
    numbers: ClassVar[tuple[str, ...]]

    def init(self, evaluate: Evaluate, z: Tensor) -> State:
        raise NotImplementedError

    def transition(
        self,
        evaluate: Evaluate,
        state: State,
        *,
        seed: int | Tensor,
        step: int | Tensor,
        offset: int = 0,
        mask: Tensor | None = None,
        statistics: bool = True,
    ) -> tuple[State, Info | None]:
        """One transition; without ``statistics`` there is no Info, which saves computing it."""
        raise NotImplementedError

    def run(
        self,
        energy: Callable[[Tensor], Tensor] | None,
        z: Tensor,
        *,
        score: Callable[[Tensor], Tensor] | None = None,
        steps: int,
        seed: int,
        step: int = 0,
        offset: int = 0,
        mask: Tensor | None = None,
        callback: Callable[[Info], Any] | None = None,
        callback_every: int = 1,
        keep_every: int | None = None,
        compile: bool = True,
    ) -> Tensor:
        """Run the chains z for ``steps`` transitions; a later call with step + steps goes on with the same stream.

        Args:
            energy: any callable (B, ...) -> (B,); pass None and ``score``, a callable (B, ...) -> (B, ...) giving
                -grad U, where only that is known. A module is put in eval mode with its parameters frozen
                meanwhile, and put back, also when it raises.
            z: the chains, (B, ...). Not changed.
            steps: transitions to make. seed, step: name the noise (`fastanila.noise`); step counts transitions made.
            offset: global index of the first chain. mask: bool, broadcastable to z; where False, z stays.
            callback: called with the `Info` of every ``callback_every``-th transition.
            keep_every: n keeps the state after every n-th transition.
            compile: compile the transition as one graph. An energy that does not trace runs eagerly, with a warning.

        Returns:
            The final chains, (B, ...), detached; with keep_every the kept states, (steps // keep_every, B, ...).
        """
        checks.count("steps", steps, least=0)
        checks.count("step", step, least=0)
        checks.count("offset", offset, least=0)
        if step + steps > noise.MAX_STEP:
            raise ValueError(f"step must leave room for steps below 2**56, got step {step} and {steps} steps")
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if not isinstance(z, Tensor):
            raise TypeError(f"z must be a tensor, got {type(z).__name__}")
        if (energy is None) == (score is None):
            raise ValueError(f"energy or score must be given, and not both, got {energy} and {score}")
        checks.count("callback_every", callback_every)
        if keep_every is not None:
            checks.count("keep_every", keep_every)
        with torch.no_grad(), sampling(energy if score is None else score):
            evaluate = evaluator(energy, score)
            if energy is not None and compile:
                _check_depends(energy, evaluate, z)
            numbers = self.numbers_on(z.device)
            state = self.init(evaluate, z.detach())
            seed_t, step_t = noise.as_word64(seed, z.device), noise.as_word64(step, z.device)
            watched = [every for every, wanted in ((callback_every, callback), (keep_every, keep_every)) if wanted]
            pieces = _pieces(steps, watched)
            whole = self.refresh == "transition" or len(pieces) <= 1
            chain = chain_of(self, energy, score, z=z, mask=mask, compile=compile, whole=whole)
            kept, made = [], 0
            for count in pieces:
                state, info = chain(count, numbers, state, seed_t, step_t, offset, mask)
                made, step_t = made + count, step_t + count
                if callback is not None and made % callback_every == 0:
                    callback(info)
                if keep_every is not None and made % keep_every == 0:
                    kept.append(state.z)
        if keep_every is None:
            return state.z if steps else z.detach().clone()
        return torch.stack(kept) if kept else z.new_empty((0, *z.shape))

    def calibrate(self, energy, z, *, score=None, clip_fraction: float = 0.05, stability: float = 0.1) -> Sampler:
        """This sampler with the step size, and the threshold if it has one, that `calibrate` proposes at z."""
        found = calibrate(
            energy,
            z,
            score=score,
            clip_fraction=clip_fraction,
            norm=getattr(self, "norm", "element"),
            stability=stability,
            noise_scale=float(getattr(self, "noise_scale", 1.0)),
        )
        threshold = {"threshold": found.threshold} if "threshold" in self.numbers else {}
        return dataclasses.replace(self, step_size=found.step_size, **threshold)

    def numbers_on(self, device: torch.device | str | None) -> tuple[Tensor, ...]:
        """The number-valued settings, in the order of ``numbers``, as 0-dim float32 tensors on the device."""
        return tuple(_number(getattr(self, name), device) for name in self.numbers)

    def with_numbers(self, numbers: tuple[Tensor, ...]) -> Sampler:
        return dataclasses.replace(self, **dict(zip(self.numbers, numbers, strict=True)))


@dataclasses.dataclass(frozen=True)
class Unadjusted(Sampler):
    """Samplers whose transition is `fastanila.ops.anisotropic_step` and nothing else. Use a subclass."""

    is_exact: ClassVar[bool] = False
    is_unadjusted: ClassVar[bool] = True

    def __post_init__(self):
        _check_numbers(self)

    def init(self, evaluate: Evaluate, z: Tensor) -> State:
        return State(z)

    def transition(self, evaluate, state, *, seed, step, offset=0, mask=None, statistics=True):
        energy, score = evaluate(state.z)
        gamma = state.gamma
        if gamma is None and self.refresh == "update":  # the chain starts: this gain is its gain
            gamma = reference.gain(score, self.threshold, self.norm)
        out = ops.anisotropic_step(
            state.z,
            score,
            self.threshold if gamma is None else None,
            step_size=self.step_size,
            noise_scale=self.noise_scale,
            norm=self.norm,
            seed=seed,
            step=step,
            offset=offset,
            gamma=gamma,
            mask=mask,
            bounds=self.bounds,
            statistics=statistics,
        )
        if not statistics:
            return State(out, gamma), None
        z, seen = out
        info = Info(
            energy=None if energy is None else energy.float(),
            score_rms=seen.score_rms,
            clip_fraction=seen.clip_fraction,
            gamma_mean=seen.gamma_mean,
            acceptance=torch.ones_like(seen.score_rms),
        )
        return State(z, gamma), info


@dataclasses.dataclass(frozen=True)
class Langevin(Unadjusted):
    """Unadjusted Langevin dynamics: z' = z + eps/2 s(z) + sigma sqrt(eps) xi.

    Law: exp(-U / sigma**2) up to a bias that vanishes with the step size, of order eps (the unadjusted Langevin
    algorithm: Roberts and Tweedie 1996). Raises ValueError, TypeError for settings that cannot be.

    step_size: eps, squared units of z. noise_scale: sigma. bounds: (low, high), to which the chains are clamped.
    """

    step_size: float | Tensor = 0.01
    noise_scale: float | Tensor = 1.0
    bounds: tuple[float, float] | None = None

    threshold: ClassVar[float] = math.inf
    numbers: ClassVar[tuple[str, ...]] = ("step_size", "noise_scale")


@dataclasses.dataclass(frozen=True)
class AniLA(Unadjusted):
    """Anisotropic Langevin dynamics (STANLEY: Karimi, Xie and Li, Algorithm 1).

        z' = z + eps/2 gamma s(z) + sigma sqrt(eps gamma) xi,      gamma = 1 / max(1, |s(z)| / b)

    Law: NOT exp(-U), however small the step. As eps -> 0 it is, with sigma = 1, exp(-U) prod_i max(1, |s_i| / b) for
    norm="element" when U is separable and exp(-U) max(1, |s| / b) for norm="chain": mass moves off the modes to the
    slopes. The bias grows with the fraction of elements that clip, so choose the threshold for few of them (a tenth,
    say) or use a Metropolis-adjusted sampler. With sigma, U / sigma**2 replaces U.

    threshold: b, in the score's unit; inf is `Langevin`. step_size: eps, squared units of z. noise_scale: sigma.
    norm: "element", "channel" or "chain", what |s| is. bounds: (low, high), to which the chains are clamped.
    refresh: "transition" takes the gain gamma from every transition's own score. "update" takes it once, from the
    score where the chain starts (each `run`, each update of a training), and holds it, as the papers' Algorithm 1 is
    printed: a fixed preconditioner, whose drift gamma * s is no longer bounded; its small-step law is exp(-U).
    """

    threshold: float | Tensor = 1.0
    step_size: float | Tensor = 0.01
    noise_scale: float | Tensor = 1.0
    norm: str = "element"
    bounds: tuple[float, float] | None = None
    refresh: str = "transition"

    numbers: ClassVar[tuple[str, ...]] = ("threshold", "step_size", "noise_scale")

    def __post_init__(self):
        super().__post_init__()
        if self.norm not in reference.NORMS:
            raise ValueError(f"norm must be one of {', '.join(reference.NORMS)}, got {self.norm!r}")
        if self.refresh not in reference.REFRESHES:
            raise ValueError(f"refresh must be one of {', '.join(reference.REFRESHES)}, got {self.refresh!r}")


SAMPLERS: dict[str, type[Sampler]] = {"langevin": Langevin, "anila": AniLA}


_depending: weakref.WeakSet = weakref.WeakSet()  #: energies that passed the next function's check


def _check_depends(energy, evaluate: Evaluate, z: Tensor) -> None:
    """Raise ValueError for an energy cut off from z: compiled, it would have a silent score of 0."""
    with contextlib.suppress(TypeError):  # not hashable: checked every time
        if energy in _depending:
            return
    evaluate(z[:1])
    with contextlib.suppress(TypeError):
        _depending.add(energy)


def _number(value: float | Tensor, device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=torch.float32)
    return torch.full((), value, dtype=torch.float32, device=device)  # a launch, where a copy would wait


def _pieces(steps: int, watched: list[int]) -> list[int]:
    """How many transitions to make between looks at the chain, which may be wanted every n-th for several n."""
    piece = min(math.gcd(*watched), steps) if watched else steps
    return [min(piece, steps - made) for made in range(0, steps, max(piece, 1))]


# ---------------------------------------------------------------------------------------- calibration of settings


class Calibration(NamedTuple):
    threshold: float  #: b at which the wanted fraction of elements would clip
    step_size: float  #: eps at which the drift of an unclipped element is small beside its noise
    score_rms: float  #: over all chains and elements


def calibrate(
    energy: Callable[[Tensor], Tensor] | None,
    z: Tensor,
    *,
    score: Callable[[Tensor], Tensor] | None = None,
    clip_fraction: float = 0.05,
    norm: str = "element",
    stability: float = 0.1,
    noise_scale: float = 1.0,
) -> Calibration:
    """Propose a threshold and a step size from the scores of the chains z, (B, ...), one gradient.

    The threshold is the (1 - clip_fraction) quantile of |s| under ``norm``. The step size makes the score's own
    change over a step small: eps = 4 stability sigma**2 / rms(s)**2, at which a typical drift eps/2 rms(s) is
    sqrt(stability) times the noise sigma sqrt(eps). On a Gaussian the unadjusted chain's variance is then too large
    by a fraction ``stability``; where the energy's curvature is uneven its stiffest directions suffer more.
    Take z from data or from settled chains.

    Raises ValueError if the scores are not finite or all zero.
    """
    if norm not in reference.NORMS:
        raise ValueError(f"norm must be one of {', '.join(reference.NORMS)}, got {norm!r}")
    if not 0 < clip_fraction < 1:
        raise ValueError(f"clip_fraction must be between 0 and 1, got {clip_fraction}")
    checks.positive("stability", stability, finite=True)
    checks.positive("noise_scale", noise_scale, finite=True)
    with torch.no_grad(), sampling(energy if score is None else score):
        _, s = evaluator(energy, score)(z.detach())
    size = reference.magnitude(s.double(), norm).flatten()
    rms = s.double().square().mean().sqrt().item()
    if not 0 < rms < math.inf:
        raise ValueError(f"the scores at z must be finite and not all zero, got a root mean square of {rms}")
    # kthvalue, because torch.quantile refuses more than 2**24 elements
    rank = min(size.numel(), max(1, math.ceil((1 - clip_fraction) * size.numel())))
    threshold = size.kthvalue(rank).values.item()
    if threshold == 0:
        raise ValueError(f"clip_fraction must be larger: {clip_fraction} leaves a threshold of 0, most scores being 0")
    return Calibration(threshold, 4 * stability * (noise_scale / rms) ** 2, rms)


def _check_numbers(sampler: Sampler) -> None:
    for name in sampler.numbers:
        value = getattr(sampler, name)
        if isinstance(value, Tensor):
            continue
        if name == "noise_scale":
            checks.nonnegative(name, value)
        else:
            checks.positive(name, value, finite=name != "threshold")
    if sampler.bounds is not None:
        object.__setattr__(sampler, "bounds", checks.bounds("bounds", sampler.bounds))
