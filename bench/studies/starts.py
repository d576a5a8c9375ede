"""Where chains start, at the same number of gradients: `python -m bench.studies.starts --out DIR [--write BLOCK]`.

Trains the same energy with chains that persist, by themselves or weighted, start from noise, or at a VAE's proposals,
as many transitions an update, and compares the models, and how far chains then have to go. With images (--data digits
--inits vae): what the transitions make of a VAE's proposals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import Tensor

from fastanila import data, generate
from fastanila.evaluate import evaluate
from fastanila.evaluation import plane as plane_evaluation
from fastanila.evaluation import quadrature
from fastanila.training import config, defaults, several
from fastanila.training import run as run_training
from fastanila.training import settings as settings_training

from .. import markdown

Line = dict[str, Any]  #: what is known of a run

#: After how many transitions the chains are looked at.
LOOKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
WITHIN = 0.05  #: of total variation
_CHAINS = 8192  #: of each start
_BINS = 24

ABOUT_PLANE = (
    "{updates} updates of {steps} transitions each, {sampler}; medians of {seeds} seeds, with the least and the most. "
    "NLL - entropy and TV are the model's to the data, by quadrature. Modes: how many have a quarter of their due in "
    "the model, and in its chains. Transitions: how many {chains:,} chains of that start need on the trained model "
    "until the total variation to its law (24 x 24 cells) is within 0.05 of what exact draws show, as many different "
    "ones and moved alike; looked at after {looks}. Persistent chains are copied to that number."
)
ABOUT_IMAGES = (
    "{updates} updates of {steps} transitions each; mean of {seeds} seeds, and their standard deviation. 1,024 fresh "
    "pairs a run: what the decoder proposes, and what the transitions make of it. Energies are means; KID and Frechet "
    "distance are to held-out images, by the features that `fastanila.evaluate` names; floor is as many training "
    "images; moved is the root mean square of how far an element moves, units of data. Margin: proposals less revised, "
    "run by run."
)


def needed(run: run_training.Run) -> int | None:
    """The least of LOOKS after which chains of the run's start are within WITHIN of its law; None if none is."""
    density, device = data.load(run.settings.data), run.chains.device
    cells = quadrature.grid(quadrature.widened(density.box, 1.25), 400, device)
    log_q = quadrature.model_log_density(run.energy, cells)
    truth = plane_evaluation.bin_masses(log_q, cells, density.box, _BINS)
    if run.settings.init in ("persistent", "weighted"):
        distinct = plane_evaluation.spaced(run.chains, _CHAINS)
    else:
        distinct = generate.sample(run, _CHAINS, start=run.settings.init, steps=0)
    alike = quadrature.draw(log_q, cells, len(distinct), seed=0, step=3)
    copies = _CHAINS // len(distinct)
    there, here = (trace(run, x.repeat(copies, 1), truth, density.box) for x in (alike, distinct))
    return next((look for look, a, b in zip(LOOKS, here, there, strict=True) if a - b <= WITHIN), None)


def trace(run: run_training.Run, z: Tensor, truth: Tensor, box: tuple[float, float]) -> Iterator[float]:
    """The total variation of chains from z to the masses ``truth``, at each of LOOKS."""
    made, first = 0, run_training.updates_past(run) * run.settings.steps  # past the noise of training
    for look in LOOKS:
        if look > made:
            z = run.sampler.run(run.energy, z, steps=look - made, seed=1, step=first + made, compile=run.settings.fused)
            made = look
        yield plane_evaluation.histogram_tv(plane_evaluation.histogram(z, box, _BINS), truth)


def measured(directory: Path, settings: settings_training.Settings, finished: bool) -> Line:
    line = {"data": settings.data, "init": settings.init, "seed": settings.seed, "diverged": not finished}
    if not finished:
        return line
    run = run_training.load(directory, "cpu")
    line |= {"sampler": settings.sampler, "steps": settings.steps, "updates": run.iteration}
    line |= evaluate(run, fused=settings.fused)
    return line | ({"transitions": needed(run)} if settings.data in defaults.PLANES else {})


# ---------------------------------------------------------------------------------------------------------- the tables


def plane_table(lines: Sequence[Line]) -> str:
    rows = []
    for (data_set, init), group in itertools.groupby(lines, lambda line: (line["data"], line["init"])):
        group = list(group)
        well = [line for line in group if not line["diverged"]]
        row = [data_set, init, spread(well, "gap", "{:.3f}"), spread(well, "tv", "{:.3f}")]
        for name in ("modes_covered_model", "modes_covered_chains"):
            found = well and name in well[0]
            row.append(f"{spread(well, name, '{:.0f}')} of {well[0]['modes']}" if found else "-")
        rows.append([*row, spread(well, "transitions", "{:.0f}"), f"{len(group) - len(well)} of {len(group)}"])
    columns = ["NLL - entropy", "TV", "modes: model", "modes: chains", "transitions", "diverged"]
    return markdown.table(["data", "chains start", *columns], "ll" + "r" * 6, rows)


def spread(lines: Sequence[Line], name: str, form: str) -> str:
    """median (least to most) of a number, None being the largest."""

    def text(x: float) -> str:
        return form.format(x) if math.isfinite(x) else f"> {LOOKS[-1]}"

    values = sorted(math.inf if line[name] is None else line[name] for line in lines)
    if not values:
        return "-"
    return f"{text(values[len(values) // 2])} ({text(values[0])} to {text(values[-1])})"


def image_table(lines: Sequence[Line]) -> str:
    rows = []
    well = [line for line in lines if not line["diverged"]]
    for data_set, group in itertools.groupby(well, lambda line: line["data"]):
        group = list(group)
        for name, before, after, floor in (
            ("mean energy", "energy_proposals", "energy_revised", None),
            ("KID", "kid_start", "kid", "kid"),
            ("Frechet distance", "frechet_start", "frechet", "frechet"),
        ):
            a, b = ([line[key] for line in group] for key in (before, after))
            margins = [x - y for x, y in zip(a, b, strict=True)]
            cells = [f"{mean(x):.4f} +- {stdev(x) if len(x) > 1 else math.nan:.4f}" for x in (a, b, margins)]
            floors = [line["baselines"]["training"][floor] for line in group] if floor else []
            rows.append([data_set, name, *cells, f"{mean(floors):.4f}" if floors else "-"])
        rows.append([data_set, "moved", "-", f"{mean(line['moved'] for line in group):.4f}", "-", "-"])
    return markdown.table(["data", "", "proposals", "revised", "margin", "floor"], "llrrrr", rows)


def report(lines: Sequence[Line], seeds: int) -> str:
    def of(name: str) -> str:
        found = {line[name] for line in lines if not line["diverged"]}
        return ", ".join(sorted(x if isinstance(x, str) else f"{x:,}" for x in found))

    numbers = {name: of(name) for name in ("updates", "steps", "sampler")}
    plane = lines[0]["data"] in defaults.PLANES
    about = (ABOUT_PLANE if plane else ABOUT_IMAGES).format(
        **numbers, seeds=seeds, chains=_CHAINS, looks=", ".join(map(str, LOOKS))
    )
    return f"{about}\n\n{plane_table(lines) if plane else image_table(lines)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["rings", "25gaussians"], help="data sets, of one kind")
    parser.add_argument("--data-dir", help="folder of the images")
    inits = ["persistent", "noise", "vae"]
    parser.add_argument(
        "--inits", nargs="+", choices=[*inits, "weighted"], default=inits, help="where chains start; of images vae"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="transitions of an update; default the data set's")
    parser.add_argument("--iterations", type=int, help="updates; default the data set's")
    parser.add_argument("--settings", nargs="+", default=[], metavar="NAME=VALUE", help="other settings of every run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and starts.json")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, which share the processor's cores")
    parser.add_argument("--write", metavar="BLOCK", help="put the table into that block of bench/RESULTS.md")
    arguments = parser.parse_args(argv)
    if len({name in defaults.PLANES for name in arguments.data}) > 1:
        parser.error(f"data must be all in two dimensions or all images, got {' '.join(arguments.data)}")
    if arguments.data[0] not in defaults.PLANES and arguments.inits != ["vae"]:
        parser.error(f"inits must be vae for images, got {' '.join(arguments.inits)}")
    common = {k: v for k in ("data_dir", "steps", "iterations") if (v := getattr(arguments, k)) is not None}
    common |= {name: json.loads(value) for name, value in (text.split("=", 1) for text in arguments.settings)}
    resolved = {
        f"{data_set}-{init}-{seed}": config.resolve(
            settings_training.Settings(data=data_set, init=init, seed=seed, sample_every=0, **common)
        )
        for data_set, init, seed in itertools.product(arguments.data, arguments.inits, arguments.seeds)
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = several.train_all(
        resolved, arguments.out / "starts.json", arguments.jobs,
        lambda name, directory, finished: measured(directory, resolved[name], finished),
    )  # fmt: skip
    text = report(lines, len(arguments.seeds))
    print(text)
    if arguments.write:
        markdown.write(text, arguments.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
