"""What the rows of a run say is going wrong, ahead of divergence where they can."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator

from .settings import Settings

#: Mean energies beyond this are not those of a model that still learns.
_EXPLODING = 1e4
_PATIENCE = 5  #: rows in a row, ahead of a warning
#: Where the gap of the energies is so many times its median in the rows before, a divergence is announced, and one is
#: made out. In healthy runs three rows in a row come to 3 times, at the edge of stability to 7, in a divergence to 1e6.
_RUNS_AWAY, _LOST = 10.0, 100.0
_AWAY_PATIENCE = 3  #: rows in a row that it takes
_HISTORY, _RECENT = 20, 200  #: rows that there must be before, and of which the median is at most
_CLIPPED = 0.9  #: of the elements: then the chains' moves are little more than their scores' signs
_UNSETTLED = 100  #: updates, and those of a VAE's warm-up, of which none is given
_COLLAPSED = 0.1  #: nats, of all latents together
_ALIKE = 0.02  #: of the revised states' spread


class Watch:
    """Tells, once each, what a run's rows say is going wrong, and what to change."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.recall([])

    def recall(self, rows: list[dict]) -> list[str]:
        """Begin anew with the rows that a run has so far, as metrics.jsonl has them; what they tell."""
        names = ("exploding", "running away", "lost", "clipped", "dead", "collapse")
        self.count = dict.fromkeys(names, 0)
        self.told: set[str] = {"lost"}  # which is told as running away
        self.gaps: list[float] = []  #: sizes of the energies' gap in the rows so far
        return [line for row in rows for line in self.see(row)]

    @property
    def running_away(self) -> bool:
        """Whether the last row may be of a run on its way out: no state to go back to."""
        return self.count["running away"] > 0 or self.count["exploding"] > 0

    @property
    def warm_up(self) -> int:
        """Updates at the start in which chains teach the energy nothing."""
        return self.settings.vae_warm_up if self.settings.init == "vae" else self.settings.matching

    @property
    def diverged(self) -> bool:
        """Whether the rows are of a run that learns no more, although all its numbers are finite."""
        return self.count["lost"] >= _AWAY_PATIENCE or self.count["exploding"] >= _PATIENCE

    def see(self, row: dict) -> list[str]:
        found = []
        row = {k: math.nan if v is None else v for k, v in row.items()}  # in a file what is not finite is null
        for name, line in self._found(row):
            self.count[name] = self.count[name] + 1 if line else 0
            patience = _AWAY_PATIENCE if name == "running away" else _PATIENCE
            if line and self.count[name] >= patience and name not in self.told:
                self.told.add(name)
                found.append(f"warning: update {row['iteration']}: {line}")
        return found

    def _times(self, iteration: int, gap: float) -> float:
        """The gap of the energies in medians of what it was in the later half of the rows before; 0 while that is not
        known."""
        first = self.warm_up
        size = abs(gap) if math.isfinite(gap) else math.inf
        known = len(self.gaps) >= _HISTORY and iteration >= first + _UNSETTLED
        recent = self.gaps[max(len(self.gaps) // 2, len(self.gaps) - _RECENT) :]
        times = size / max(statistics.median(recent), sys.float_info.min) if known else 0.0
        if iteration > first:  # up to there the energy stands still
            self.gaps.append(size)
        return times

    def _found(self, row: dict) -> Iterator[tuple[str, str | None]]:
        """What is wrong by this row, None for each thing that is not."""
        s = self.settings
        settled = row["iteration"] >= _UNSETTLED + self.warm_up
        largest = max((row[k] for k in ("energy_data", "energy_chains", "energy_proposals") if k in row), key=abs)
        exploding = settled and not abs(largest) <= _EXPLODING
        gap = row["energy_chains"] - row["energy_data"]
        times = self._times(row["iteration"], gap)
        clipped = settled and row.get("clip_fraction", 0.0) > _CLIPPED
        collapsed = settled and row.get("kl", math.inf) < _COLLAPSED
        dead = settled and not collapsed and (row.get("spread", 1.0) < _ALIKE or row.get("vae_grad_norm") == 0)
        lines = {
            "exploding": exploding
            and f"the energies explode (mean energy {largest:.3g}): lower --lr (now {s.lr:g}), or raise --energy-l2 "
            f"(now {s.energy_l2:g}) or --steps (now {s.steps})",
            "running away": times > _RUNS_AWAY
            and f"the energies run away (gap {gap:.3g}, {times:.0f} times its median so far), as ahead of divergence: "
            f"lower --lr (now {s.lr:g}) or --step-size (now {s.step_size:g}), or raise --energy-l2 (now "
            f"{s.energy_l2:g}); --on-divergence rollback halves the learning rate by itself",
            "lost": times > _LOST and "the energies have run away",
            "clipped": clipped
            and f"{row['clip_fraction']:.0%} of the elements are clipped, and the chains no longer follow the energy: "
            f"lower --lr (now {s.lr:g}), or raise --threshold (now {s.threshold:g})",
            "collapse": collapsed
            and f"posterior collapse (kl {row['kl']:.2g} nats over {s.latent} latents): the decoder ignores its "
            f"latents; lower --kl-weight (now {s.kl_weight:g})",
            "dead": dead
            and f"the VAE is dead (its proposals vary {row['spread']:.1%} as much as the revised states): raise "
            f"--vae-lr (now {s.vae_lr:g}) or --vae-width (now {s.vae_width})",
        }
        yield from ((name, line or None) for name, line in lines.items())
