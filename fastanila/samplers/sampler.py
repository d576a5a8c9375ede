"""What all samplers share: frozen settings, a pure transition, and a loop over it. The samplers are in `samplers`.

Each sampler is a frozen dataclass with

    init(evaluate, z) -> State                                     what a chain carries from transition to transition
    transition(evaluate, state, *, seed, step, ...) -> (State, Info)
    proposal(z, score) -> Proposal                                 the normals that a transition draws from at z
    run(energy, z, *, steps, seed, step=0, ...) -> z               transitions step, step + 1, ..., step + steps - 1

where ``evaluate`` maps z (B, ...) to (energy (B,), score (B, ...)) with score = -grad U. A transition takes a bare
State(z) as well, and begins with `init` then. Their number-valued settings may be 0-dim tensors, which a compiled
transition takes without recompiling. ``is_exact`` says whether the law of the chain converges to exp(-U) itself; where
it is False, the docstring says what law it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .. import checks, noise
from ..models.score import Evaluate, outside_inference, sampling
from ..models.wrappers import for_chains
from ..ops.arguments import check_chains, check_mask, check_norm
from ..ops.reference import NORMS, REFRESHES, Proposal
from .calibration import calibrate
from .chain import chain_of, whole_run
from .state import Info, State

S = TypeVar("S", bound="Sampler")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What all samplers share. Use a subclass."""

    is_exact: ClassVar[bool]
    #: whose magnitude |s| is, and when the gain is taken: see `AniLA`, where they are fields, which is why they have no
    #: annotation here: a dataclass would put them ahead of the others
    norm = "element"
    refresh = "transition"
    #: whether a transition is one anisotropic step, which exact samplers judge: what the whole-chain kernels can make
    whole_chain: ClassVar[bool] = False
    #: whether a transition compiles as one graph; otherwise its energy and score do
    is_one_graph: ClassVar[bool] = True
    #: settings that change freely under a compiled transition
    numbers: ClassVar[tuple[str, ...]]

    @property
    def gradients(self) -> int:
        """Gradients of the energy that a transition takes; a chain of an exact sampler takes one more at its start."""
        return 1

    def init(self, evaluate: Evaluate, z: Tensor) -> State:
        """What a chain at z (B, ...) carries into its first transition."""
        return State(z)

    def init_by(self, advance: Callable, state: State, *, seed: Tensor, step: Tensor, offset: int, mask) -> State:
        """`init` by the transition itself, which is advance(state, seed, step, offset, mask) -> State.

        Returns ``state`` with all that the chain carries, so that its first transition, ``step``, is the same graph as
        the others.
        """
        return state

    def proposal(self, z: Tensor, score: Tensor) -> Proposal:
        """The independent normals that a transition draws from at z (B, ...), ahead of clamping or any correction.

        score: (B, ...), -grad U at z. Raises NotImplementedError for `HMC`, whose transition is no such draw.
        """
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
            energy: any callable (B, ...) -> (B,), which is only ever called with all B chains; pass None and ``score``,
                a callable (B, ...) -> (B, ...) giving -grad U, where only that is known. A module is put in eval mode
                with its parameters frozen meanwhile, and put back, also when it raises; so are the modules that another
                callable refers to, as far as `callables.modules` finds them.
            z: the chains, (B, ...), float32, bfloat16 or float16. Not changed.
            steps: transitions to make.
            seed: names the noise, with ``step`` (`fastanila.noise`).
            step: transitions made before.
            offset: global index of the first chain.
            mask: bool, broadcastable to z; where False, z stays.
            callback: called with the `Info` of every ``callback_every``-th transition.
            keep_every: n keeps the state after every n-th transition.
            compile: compile the transition as one graph, which is kept for as long as the energy lives; of functions,
                for others of the same code over the same objects too. An energy that does not trace runs eagerly, with
                one warning.

        Returns:
            The final chains, (B, ...), detached; with keep_every the kept states, (steps // keep_every, B, ...).

        Raises:
            TypeError, ValueError: naming the argument, what it was and what was expected, ahead of any compiling; and
                for an energy that is not (B,) or does not depend on z.
        """
        check_run(self, z, steps, seed, step, offset, mask)
        checks.callables(energy=energy, score=score, callback=callback)
        if (energy is None) == (score is None):
            raise ValueError(f"energy or score must be given, and not both, got {energy} and {score}")
        if energy is None and self.is_exact:
            raise ValueError(f"energy must be given, for {type(self).__name__} compares energies, got a score only")
        checks.count("callback_every", callback_every)
        if keep_every is not None:
            checks.count("keep_every", keep_every)
        if compile and steps and not (callback or keep_every or score):
            # ahead of all that other ways need, which would take the host longer than the launch takes the device
            placed = self.placed_on(z.device)
            after = whole_run(placed, energy, z, steps=steps, seed=seed, step=step, offset=offset, mask=mask)
            if after is not None:
                return after
        watched = [every for every, wanted in ((callback_every, callback), (keep_every, keep_every)) if wanted]
        pieces = _pieces(steps, watched)
        whole = self.refresh == "transition" or len(pieces) <= 1
        with self._chain(energy, z, score, mask, seed, step, compile, whole) as (chain, state, seed_t, step_t):
            numbers = self.numbers_on(z.device)
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

    @contextlib.contextmanager
    def _chain(self, energy, z, score, mask, seed, step, compile, whole=True) -> Iterator[tuple]:
        """(chain, its first state, seed and step as tensors), with the energy ready for sampling meanwhile."""
        with torch.no_grad(), sampling(energy if score is None else score):
            z = outside_inference(z.detach())
            if compile:
                energy = for_chains(energy)
            chain = chain_of(self, energy, score, z=z, mask=mask, compile=compile, whole=whole)
            yield chain, State(z), noise.as_word64(seed, z.device), noise.as_word64(step, z.device)

    def calibrate(self: S, energy, z, *, score=None, clip_fraction: float = 0.05, stability: float = 0.1) -> S:
        """This sampler with the step size, and the threshold if it has one, that `calibrate` proposes at z."""
        found = calibrate(
            energy,
            z,
            score=score,
            clip_fraction=clip_fraction,
            norm=self.norm,
            stability=stability,
            noise_scale=float(self.noise_scale),
        )
        threshold = {"threshold": found.threshold} if "threshold" in self.numbers else {}
        return dataclasses.replace(self, step_size=found.step_size, **threshold)

    def numbers_on(self, device: torch.device | str | None) -> tuple[Tensor, ...]:
        """The number-valued settings, in the order of ``numbers``, as 0-dim float32 tensors on the device."""
        return tuple(_number(getattr(self, name), device) for name in self.numbers)

    def placed_on(self, device: torch.device) -> Sampler:
        """This sampler, its 0-dim tensors on the device as float32; numbers stay numbers."""
        settings = {name: getattr(self, name) for name in self.numbers}
        moved = {name: _number(x, device) for name, x in settings.items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **moved) if moved else self

    def built_in(self) -> tuple[type[Sampler], tuple]:
        """The kind of sampler, and (name, value) of the settings that a compiled transition has as constants."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in self.numbers]
        return type(self), tuple((name, getattr(self, name)) for name in names)

    def with_numbers(self, numbers: tuple[Tensor, ...]) -> Sampler:
        return dataclasses.replace(self, **dict(zip(self.numbers, numbers, strict=True)))


def check_settings(sampler: Sampler) -> None:
    """Raise ValueError, TypeError naming the setting of any sampler that cannot be."""
    for name in sampler.numbers:
        value = getattr(sampler, name)
        if isinstance(value, Tensor):
            continue
        if name == "noise_scale":
            checks.nonnegative(name, value)
        else:
            checks.positive(name, value, finite=name != "threshold")
    for name, known in (("norm", NORMS), ("refresh", REFRESHES)):
        if getattr(sampler, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(sampler, name)!r}")


def check_run(sampler: Sampler, z, steps, seed, step, offset, mask) -> None:
    """What every run takes, however its transitions are made. Some microseconds: a run can be a single launch."""
    checks.count("steps", steps, least=0)
    checks.count("step", step, least=0)
    checks.count("offset", offset, least=0)
    if step + steps > noise.MAX_STEP:
        raise ValueError(f"step must leave room for steps below 2**56, got step {step} and {steps} steps")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    check_chains(z)
    if z.layout is not torch.strided:
        raise TypeError(f"z must be a dense tensor, got one of layout {z.layout}")
    check_norm(sampler.norm, z)
    check_mask(mask, z)


def _number(value: float | Tensor, device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=torch.float32)
    return torch.full((), value, dtype=torch.float32, device=device)  # a launch, where a copy would wait


def _pieces(steps: int, watched: list[int]) -> list[int]:
    """How many transitions to make between looks at the chain, which may be wanted every n-th for several n."""
    piece = min(math.gcd(*watched), steps) if watched else steps
    return [min(piece, steps - made) for made in range(0, steps, max(piece, 1))]
