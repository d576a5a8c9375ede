"""Replica exchange: chains at several temperatures that trade places, so that the cold ones cross between modes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, noise
from ..models.score import Evaluate
from ..noise import Stream
from . import adaptation, calibration
from .ladder import between, equalised, exchanged, geometric
from .metropolis import ABOVE_ALL, Adapted, Adjusted
from .replicas import Replicas, Rows, restated, rows_of, tempered, traded
from .sampler import Sampler
from .state import State


@dataclasses.dataclass(frozen=True)
class ReplicaExchange(Sampler):
    """Replica exchange, or parallel tempering (Swendsen and Wang 1986; Geyer 1991), of an exact sampler.

    R replicas of B chains are one batch of R B rows, the cold ones first: row r B + b is chain b at temperature T_r, of
    the law exp(-U / T_r), and T_0 = 1. A transition makes one of ``sampler`` in every row. Then neighbours in
    temperature exchange their states with probability min(1, exp((1/T_r - 1/T_{r+1}) (U_r - U_{r+1}))): the even pairs
    at even steps, the odd pairs at odd ones, which carries states through the temperatures faster than pairs at random
    (Okabe et al. 2001; Syed, Bouchard-Cote, Deligiannidis and Doucet 2022). An exchange takes no gradient.

    Law: of the R B rows together prod_r exp(-U(z_r) / T_r), exactly; so of the cold rows exp(-U).

    ``sampler`` moves y = z / s_r with the energy U(s_r y) / T_r, whatever the row, by the same step size eps: z moves
    by s_r^2 eps, and ``sampler`` needs not know of temperatures. AdjustedAniLA's threshold is on the score of y, which
    is s_r / T_r times that of z.

    Args:
        sampler: `MALA`, `AdjustedAniLA` or `HMC`, with the step size of the cold rows.
        temperatures: T_0 = 1 < T_1 < ..., (R,); `geometric` makes some, and `adapt` moves them.
        scales: s_0 = 1, s_1, ..., (R,), default the roots of the temperatures, which are right for a Gaussian.

    Raises:
        ValueError, TypeError: for settings that cannot be.
    """

    sampler: Any  #: an `Adjusted`
    temperatures: Any = (1.0,)  #: floats, or a tensor where they change freely; so are the scales
    scales: Any = None

    is_exact: ClassVar[bool] = True
    threshold: ClassVar[float] = math.inf
    noise_scale: ClassVar[float] = 1.0
    bounds: ClassVar[None] = None
    numbers: ClassVar[tuple[str, ...]] = ("temperatures", "scales")

    def __post_init__(self):
        if not isinstance(self.sampler, Adjusted):
            raise TypeError(f"sampler must be MALA, AdjustedAniLA or HMC, got {type(self.sampler).__name__}")
        if isinstance(self.temperatures, Tensor):  # its values are not read back
            return
        temperatures = tuple(float(t) for t in self.temperatures)
        object.__setattr__(self, "temperatures", temperatures)
        rising = all(a < b < math.inf for a, b in itertools.pairwise(temperatures))
        if not temperatures or temperatures[0] != 1 or not rising:
            raise ValueError(f"temperatures must be 1 and then larger and larger, got {temperatures}")
        scales = [math.sqrt(t) for t in temperatures] if self.scales is None else [float(s) for s in self.scales]
        for scale in scales:
            checks.positive("scales", scale, finite=True)
        if len(scales) != len(temperatures) or scales[0] != 1:
            raise ValueError(f"scales must be 1 and then one for each temperature, got {tuple(scales)}")
        object.__setattr__(self, "scales", tuple(scales))

    @property
    def replicas(self) -> int:
        """R, how many temperatures there are."""
        return len(self.temperatures)

    @property
    def gradients(self) -> int:
        """Of each of the R B rows, as for `Sampler`."""
        return self.sampler.gradients

    @property
    def is_one_graph(self) -> bool:  # type: ignore[override]
        return self.sampler.is_one_graph

    @property
    def norm(self) -> str:  # type: ignore[override]
        return self.sampler.norm

    @classmethod
    def of(cls, sampler: Adjusted, *, replicas: int = 8, highest: float) -> ReplicaExchange:
        """That many replicas of a sampler, at temperatures from 1 to ``highest`` in equal ratios."""
        return cls(sampler, geometric(replicas, highest))

    def start(self, z: Tensor) -> Tensor:
        """(R B, ...): every replica at the chains z (B, ...)."""
        return z.repeat(self.replicas, *[1] * (z.dim() - 1))

    def cold(self, z: Tensor) -> Tensor:
        """(B, ...): the rows of the states z (R B, ...), or of anything that has such rows, whose law is exp(-U)."""
        return z[: len(z) // self.replicas]

    def init(self, evaluate: Evaluate, z: Tensor) -> Replicas:  # type: ignore[override]
        rows = self._rows(z)
        return Replicas(z, self.sampler.init(tempered(evaluate, rows), (z / rows.scale).to(z.dtype)))

    def init_by(self, advance, state, *, seed, step, offset, mask):
        """As the inner sampler does it: see `_AdjustedStep.init_by`. In its transition ahead of the first no replicas
        are exchanged, all energies being above all others."""
        fresh = not isinstance(state, Replicas)
        inner = State((state.z / self._rows(state.z).scale).to(state.z.dtype)) if fresh else state.inner

        def moved(inner, seed, step, offset, mask):
            return advance(Replicas(state.z, inner), seed, step, offset, mask).inner

        complete = self.sampler.init_by(moved, inner, seed=seed, step=step, offset=offset, mask=mask)
        return state if complete is inner else Replicas(state.z, complete)

    def transition(self, evaluate, state, *, seed, step, offset=0, mask=None, statistics=True):
        rows = self._rows(state.z)
        if not isinstance(state, Replicas):
            state = self.init(evaluate, state.z)
        where = dict(seed=seed, offset=offset, mask=mask)
        moved, info = self.sampler.transition(
            tempered(evaluate, rows), state.inner, step=step, statistics=statistics, **where
        )
        # an energy above all others is that of no state: see `init_by`
        judged = torch.where(state.inner.energy < ABOVE_ALL, moved.energy / rows.beta, math.nan)
        u = noise.uniform(judged.shape, seed=seed, step=step, stream=Stream.SWAPS, offset=offset, device=judged.device)
        betas = rows.beta.unflatten(0, (self.replicas, -1))[:, 0]
        source = exchanged(judged.unflatten(0, (self.replicas, -1)), betas, u.unflatten(0, (self.replicas, -1)), step)
        after = traded(moved, (moved.z * rows.scale).to(moved.z.dtype), rows, source)
        after = after._replace(inner=self.sampler.proposed(after.inner, step=step + 1, **where))
        if info is None:
            return after, None
        beta, pull = rows.beta, rows.pull.flatten()
        return after, info._replace(energy=info.energy / beta, score_rms=info.score_rms / pull)

    def _rows(self, z: Tensor) -> Rows:
        return rows_of(z, self.temperatures, self.scales)

    # ------------------------------------------------------------------------------------------------ runs and warm-up

    def run(self, energy, z, **settings):
        """As for `Sampler`, of the states z (R B, ...) of all replicas, which `start` makes of B chains.

        offset: global index of the first row. mask: must be None, for states that trade places move as a whole. The
        callback's `Info` has the R B rows too: its energies are U, at the states that the transition began from.
        """
        self._check(z, settings.get("mask"))
        return super().run(energy, z, **settings)

    def _check(self, z: Any, mask: Tensor | None) -> None:
        if mask is not None:
            raise ValueError("mask must be None with replicas, whose states trade places as a whole")
        if isinstance(z, Tensor) and z.dim() and len(z) % self.replicas:
            raise ValueError(f"z must have as many chains for each of {self.replicas} replicas, got {len(z)} rows")

    def adapt(
        self,
        energy: Callable[[Tensor], Tensor],
        z: Tensor,
        *,
        steps: int,
        seed: int,
        step: int = 0,
        offset: int = 0,
        mask: Tensor | None = None,
        target_acceptance: float | None = None,
        compile: bool = True,
    ) -> Adapted:
        """Move the temperatures between the first and the last, and every replica's step size; then freeze them.

        As `Adjusted.adapt`, with an acceptance rate for each replica. After an eighth, a quarter and a half of the
        ``steps`` the temperatures move to where neighbours would be exchanged equally often, by the rates since
        (Syed et al. 2022, section 5): the states z (R B, ...) go on at the new ones. Transitions made meanwhile do not
        have the law: count them as warm-up. Arguments and errors as for `Adjusted.adapt`.
        """
        self._check(z, mask)
        adaptation.check(self, energy, z, steps, seed, step, offset, mask)
        target = adaptation.aim(self.sampler, target_acceptance)
        rounds, refused, since = {steps // 8, steps // 4, steps // 2} - {0}, torch.zeros(()), 0
        now = self
        found = calibration.dual_averaging(self._step_sizes(z.device))
        with self._chain(energy, z, None, None, seed, step, compile) as (chain, state, seed_t, step_t):
            for t in range(steps):
                before, now = now, now._at_sizes(found.step_size)
                state = restated(state, before._rows(z), now._rows(z))
                state, info = chain(1, now.numbers_on(z.device), state, seed_t, step_t + t, offset, None)
                acceptance = info.acceptance.unflatten(0, (self.replicas, -1)).mean(1)
                found = calibration.averaged(found, acceptance, target)
                refused, since = refused + 1 - now.swap_rates(info.energy), since + 1
                if t + 1 in rounds and self.replicas > 2:
                    placed = equalised(now.temperatures, (refused / since).tolist())
                    found = calibration.DualAveraging(*(between(x, now.temperatures, placed) for x in found))
                    before, now = now, dataclasses.replace(now, temperatures=placed)
                    state = restated(state, before._rows(z), now._rows(z))
                    refused, since = torch.zeros(()), 0
        return Adapted(now._at_sizes(found.kept), state.z)

    def _step_sizes(self, device) -> Tensor:
        return torch.as_tensor(self.scales, dtype=torch.float32, device=device).square() * float(self.sampler.step_size)

    def _at_sizes(self, step_sizes: Tensor) -> ReplicaExchange:
        sizes = step_sizes.tolist()
        scales = [1.0, *(math.sqrt(size / sizes[0]) for size in sizes[1:])]
        return dataclasses.replace(self, sampler=dataclasses.replace(self.sampler, step_size=sizes[0]), scales=scales)

    def swap_rates(self, energies: Tensor) -> Tensor:
        """(R - 1,): the mean probability of an exchange of each replica with the next, of the energies U (R B,)."""
        u = energies.unflatten(0, (self.replicas, -1))
        betas = 1 / torch.as_tensor(self.temperatures, dtype=torch.float32, device=u.device)
        log_ratio = (betas[:-1] - betas[1:])[:, None] * (u[:-1] - u[1:])
        return log_ratio.clamp(max=0).exp().nan_to_num(0.0).mean(1)  # not a number: neither energy is finite

    def calibrate(self, energy, z, **settings):
        """This sampler with the inner one's step size, and threshold, as `Sampler.calibrate` proposes them at z, some
        states of the cold law."""
        return dataclasses.replace(self, sampler=self.sampler.calibrate(energy, z, **settings))

    # ------------------------------------------------------------------------------------------- what changes freely

    def numbers_on(self, device):
        of = dict(dtype=torch.float32, device=device)
        own = (torch.as_tensor(self.temperatures, **of), torch.as_tensor(self.scales, **of))
        return (*self.sampler.numbers_on(device), *own)

    def placed_on(self, device):
        return self

    def with_numbers(self, numbers):
        *inner, temperatures, scales = numbers
        return ReplicaExchange(self.sampler.with_numbers(tuple(inner)), temperatures, scales)

    def built_in(self):
        kind, settings = self.sampler.built_in()
        return ReplicaExchange, (("sampler", kind(**dict(settings))),)
