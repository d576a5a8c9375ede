"""What a run reports while it goes: metrics.jsonl, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from torch import nn

from .. import files
from ..data import classes, completion, samples
from ..evaluation import plane, plots, vectors
from ..samplers import starts, weighted
from . import build
from .config import tensorboard_writer
from .job import Job
from .live import live
from .update import Update, revision


class Metrics:
    """metrics.jsonl, and TensorBoard's event files where wanted; rows after the resumed update are dropped.

    rows: those of before, as the file has them."""

    def __init__(self, directory: Path, iteration: int, tensorboard: bool):
        self.path, self.events = directory / "metrics.jsonl", directory / "tensorboard" if tensorboard else None
        self.rows = self._begin(iteration)

    def _begin(self, iteration: int) -> list[dict]:
        rows = read_rows(self.path) if iteration else []
        kept = [row for row in rows if row["iteration"] <= iteration]
        files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.board = self.events and tensorboard_writer()(str(self.events), purge_step=iteration + 1)
        return kept

    def back_to(self, iteration: int) -> None:
        """Drop the rows after an update, as when a run is resumed there."""
        self.__exit__()
        self.rows = self._begin(iteration)
        self.__enter__()

    def __enter__(self):
        self.file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # what was not written is what `write` has told of
            self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, row: dict) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}  # JSON has no NaN or infinity
        try:
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk names no file
            error.filename = str(self.path)
            raise
        if self.board is not None:
            for name in row.keys() - {"iteration"}:
                self.board.add_scalar(name, row[name], row["iteration"])


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that a killed writer left unfinished is dropped, another is told."""
    rows, lines = [], path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                warnings.warn(f"{path}: line {number} is no JSON, and left out", stacklevel=2)
    return rows


class Progress:
    """A bar on a terminal; about twenty plain lines elsewhere."""

    def __init__(self, first: int, iterations: int, say: Callable[[str], None]):
        self.first, self.iterations, self.say, self.bar = first, iterations, say, None
        self.every = max(1, (iterations - first) // 20)
        self.next = first + 1

    def __enter__(self):
        self.began = time.perf_counter()
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.iterations, initial=self.first, unit="update", dynamic_ncols=True)
            self.bar.set_postfix_str("the first update is under way")
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def show(self, row: dict) -> None:
        shown = (
            f"energy data {row['energy_data']:.3f} chains {row['energy_chains']:.3f} gap {row['energy_gap']:+.3f} "
            + (f"clipped {row['clip_fraction']:.1%}" if "clip_fraction" in row else "")
            + (f" matching {row['matching']:.3f}" if "matching" in row else "")
            + (f" moved {row['moved']:.3f} recon {row['reconstruction']:.3f} kl {row['kl']:.2f}" if "kl" in row else "")
            + (f" accepted {row['acceptance']:.1%}" if row.get("acceptance", 1) < 1 else "")
            + (f" ess {row['ess']:.1%}" if "ess" in row else "")
            + (f" nll live {row['nll_live']:.3f}" if "nll_live" in row else "")
            + (f" nll {row['nll']:.3f}" if "nll" in row else "")
            + (f" accuracy {row['accuracy']:.1%}" if "accuracy" in row else "")
        )
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(row["iteration"] - self.bar.n)
        elif row["iteration"] >= self.next or "nll" in row:
            rate = (row["iteration"] - self.first) / (time.perf_counter() - self.began)
            self.say(f"update {row['iteration']:>6}  {shown}  {rate:.1f} updates/s")
            self.next = row["iteration"] + self.every

    def back_to(self, iteration: int) -> None:
        """Go on from an earlier update."""
        self.first, self.began, self.next = iteration, time.perf_counter(), iteration + self.every
        if self.bar is not None:
            self.bar.update(iteration - self.bar.n)

    def note(self, line: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            self.say(line)


_PROPOSALS = 20_000  #: whose histogram is compared with the model's law


def summary(job: Job, made: Update) -> dict[str, float | int]:
    """A line of metrics.jsonl."""
    on_data, on_chains = made.energy_data.item(), made.energy_chains.item()
    free = gains = 1.0  # shares of the elements that the statistics are to be of; those of the others are 0 and 1
    if (condition := build.condition(job.settings)) is not None:
        free, gains = (condition.share(job.chains, norm).item() for norm in ("element", job.sampler.norm))
    row = {
        "iteration": job.iteration,
        "energy_data": on_data,
        "energy_chains": on_chains,
        "energy_gap": on_chains - on_data,
        "grad_norm": made.grad_norms[0].item(),
        "lr": job.rate * job.ebm.rate.at(job.iteration - 1),
        "seconds": job.seconds,
    }
    if made.info is not None:
        row |= {
            "score_rms": (made.info.score_rms.square().mean() / free).sqrt().item(),
            "clip_fraction": made.info.clip_fraction.mean().item() / gains,
            "gamma_mean": 1 - (1 - made.info.gamma_mean.mean().item()) / gains,
            "acceptance": made.info.acceptance.mean().item(),
        }
    if made.matching is not None:
        row["matching"] = made.matching.item()
    if made.teaching is not None:
        row |= {name: value.item() for name, value in made.teaching._asdict().items()} | revision(job)
        row |= {"vae_grad_norm": made.grad_norms[1].item(), "vae_lr": job.rate * job.vae.rate.at(job.iteration - 1)}
    if made.classification is not None:
        row |= {name: value.item() for name, value in made.classification._asdict().items()}
    row |= live(job)
    if job.rolled_back:
        row |= {"rollback": len(job.rolled_back), "diverged": job.rolled_back[-1].diverged}
    return row


def exact_numbers(job: Job) -> dict[str, float]:
    """In two dimensions the negative log likelihood (of the held-out points where there are points only), and of a
    density how far the model's law is from the data's (tv) and, of init="vae", the proposals' from the model's
    (tv_proposals), by quadrature; nothing otherwise."""
    if job.data.shape != (2,):
        return {}
    energy = evaluated(job)
    if isinstance(job.data, samples.Vectors):  # points, whose own density nobody knows
        return {"nll": vectors.held_out_nll(energy, job.data, job.device)}
    numbers = plane.evaluate(energy, job.data, resolution=200, device=job.device)
    row = {"nll": numbers["nll"], "tv": numbers["tv"]}
    if job.vae is not None:
        proposals = starts.proposals(job.vae.model, _PROPOSALS, seed=job.settings.seed, update=job.settings.iterations)
        row["tv_proposals"] = plane.law_tv(energy, job.data, proposals)
    return row


def evaluated(job: Job) -> nn.Module:
    return build.at_precision(job.ebm.model, job.settings.precision)


def picture(job: Job, path: Path) -> None:
    """What the chains are at, in the order of their classes if they have any; of init="vae" the last update's proposals
    above what became of them, and of init="weighted" resampled by their weights."""
    chains = job.chains
    if job.settings.init == "weighted":
        walkers = job.start.walkers
        chains = weighted.evenly(walkers.states, walkers.log_weights, seed=job.seed, step=job.iteration)
    if job.data.shape == (2,):
        title = f"{job.data.name}, {job.iteration} updates"
        plots.save_plane(path, evaluated(job), job.data, chains, title, proposals=job.proposals)
        return
    if chains.dim() == 2:
        vectors.save_pairs(path, job.data, chains, f"{job.data.name}, {job.iteration} updates", job.proposals)
        return
    shown = [x for x in (job.proposals, chains) if x is not None]
    if job.settings.task == "completion":
        shown = [completion.images(x) for x in (completion.hidden(chains), *shown)]
    if job.settings.classes:
        z = chains[:64]
        shown = [classes.images(z)[classes.labels(z).argsort(stable=True)]]
    if len(shown) == 1:
        plots.save_images(path, shown[0][:64], job.data.box)
    else:
        plots.save_under(path, [x[:64] for x in shown], job.data.box)
