"""Where chains start, at the same number of gradients: `python -m bench.starts --out DIR [--write]`.

Trains the same energy with chains that persist, start from noise, or at a VAE's proposals, as many transitions an
update, and compares the models, and how far chains then have to go. With images (--data digits --inits vae): what the
transitions make of a VAE's proposals.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from fastanila import data, generate
from fastanila.compare import train
from fastanila.evaluate import evaluate
from fastanila.evaluation import plane as plane_evaluation
from fastanila.evaluation import quadrature
from fastanila.training import config, defaults
from fastanila.training import run as run_training
from fastanila.training import settings as settings_training

from . import report

#: After how many transitions the chains are looked at.
LOOKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
WITHIN = 0.05  #: of total variation
_CHAINS = 8192  #: of each start
_BINS = 24

ABOUT_PLANE = (
    "{updates} updates of {steps} transitions each, {samplers}; medians of {seeds} seeds, with the least and the most. "
    "NLL - entropy and TV are the model's to the data, by quadrature. Modes: how many have a quarter of their due in "
    "the model, and in its chains. Transitions: how many {chains:,} chains of that start need on the trained model "
    "until the total variation to its law (24 x 24 cells) is within 0.05 of what exact draws show, as many different "
    "ones and moved alike; looked at after {looks}. Persistent chains are copied to that number."
)
ABOUT_IMAGES = (
    "{updates} updates of {steps} transitions each; mean of {seeds} seeds, and their standard deviation. 1,024 fresh "
    "pairs a run: what the decoder proposes, and what the transitions make of it. Energies are means; Frechet distance "
    "and squared MMD are to held-out images, on principal components of the training images; floor is as many training "
    "images; moved is the root mean square of how far an element moves, units of data. Margin: proposals less revised, "
    "run by run."
)


def settings_of(data_set: str, init: str, seed: int, common: dict[str, Any]) -> settings_training.Settings:
    return config.resolve(settings_training.Settings(data=data_set, init=init, seed=seed, sample_every=0, **common))


def needed(run: run_training.Run) -> int | None:
    """The least of LOOKS after which chains of the run's start are within WITHIN of its law; None if none is."""
    density, device = data.load(run.settings.data), run.chains.device
    cells = quadrature.grid(quadrature.widened(density.box, 1.25), 400, device)
    log_q = quadrature.model_log_density(run.energy, cells)
    truth = plane_evaluation.bin_masses(log_q, cells, density.box, _BINS)
    if run.settings.init == "persistent":
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


# ---------------------------------------------------------------------------------------------------------- the tables


def measured(directory: Path, settings: settings_training.Settings, finished: bool) -> dict[str, Any]:
    """What is known of a run."""
    line = {"data": settings.data, "init": settings.init, "seed": settings.seed, "diverged": not finished}
    if not finished:
        return line
    run = run_training.load(directory, "cpu")
    line |= {"sampler": settings.sampler, "steps": settings.steps, "updates": run.iteration}
    line |= evaluate(run, fused=settings.fused)
    return line | ({"transitions": needed(run)} if settings.data in defaults.PLANES else {})


def plane_table(lines: Sequence[dict[str, Any]]) -> str:
    head = "| data | chains start | NLL - entropy | TV | modes: model | modes: chains | transitions | diverged |"
    rows = [head, "| --- | --- |" + " ---: |" * 6]
    for (data_set, init), group in itertools.groupby(lines, lambda line: (line["data"], line["init"])):
        group = list(group)
        well = [line for line in group if not line["diverged"]]
        cells = [spread(well, "gap", "{:.3f}"), spread(well, "tv", "{:.3f}")]
        for where in ("model", "chains"):
            found = well and f"modes_covered_{where}" in well[0]
            cells.append(spread(well, f"modes_covered_{where}", "{:.0f}") + f" of {well[0]['modes']}" if found else "-")
        cells += [spread(well, "transitions", "{:.0f}"), f"{len(group) - len(well)} of {len(group)}"]
        rows.append(f"| {data_set} | {init} | {' | '.join(cells)} |")
    return "\n".join(rows)


def spread(lines: Sequence[dict[str, Any]], name: str, form: str) -> str:
    """median (least to most) of a number, None being the largest."""

    def text(x: float) -> str:
        return form.format(x) if math.isfinite(x) else f"> {LOOKS[-1]}"

    values = sorted(math.inf if line[name] is None else line[name] for line in lines)
    if not values:
        return "-"
    return f"{text(values[len(values) // 2])} ({text(values[0])} to {text(values[-1])})"


def image_table(lines: Sequence[dict[str, Any]]) -> str:
    rows = ["| data | | proposals | revised | margin | floor |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for data_set, group in itertools.groupby(lines, lambda line: line["data"]):
        group = [line for line in group if not line["diverged"]]
        if not group:
            continue
        for name, before, after, floor in (
            ("mean energy", "energy_proposals", "energy_revised", None),
            ("Frechet distance", "frechet_start", "frechet", "frechet_train"),
            ("MMD, squared", "mmd_start", "mmd", None),
        ):
            a, b = ([line[key] for line in group] for key in (before, after))
            margins = [x - y for x, y in zip(a, b, strict=True)]
            cells = [f"{mean(x):.4f} +- {stdev(x) if len(x) > 1 else math.nan:.4f}" for x in (a, b, margins)]
            cells.append(f"{mean(line[floor] for line in group):.4f}" if floor else "-")
            rows.append(f"| {data_set} | {name} | {' | '.join(cells)} |")
        rows.append(f"| {data_set} | moved | - | {mean(line['moved'] for line in group):.4f} | - | - |")
    return "\n".join(rows)


def markdown(lines: Sequence[dict[str, Any]], seeds: int) -> str:
    well = [line for line in lines if not line["diverged"]]
    plane = lines[0]["data"] in defaults.PLANES

    def of(name: str) -> str:
        return ", ".join(sorted({f"{line[name]:,}" if name != "sampler" else line[name] for line in well}))

    about = (ABOUT_PLANE if plane else ABOUT_IMAGES).format(
        updates=of("updates"), steps=of("steps"), samplers=of("sampler"), seeds=seeds, chains=_CHAINS,
        looks=", ".join(map(str, LOOKS)),
    )  # fmt: skip
    return f"{about}\n\n{plane_table(lines) if plane else image_table(lines)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["rings", "25gaussians"], help="data sets, of one kind")
    parser.add_argument("--data-dir", help="folder of the images")
    inits = ["persistent", "noise", "vae"]
    parser.add_argument("--inits", nargs="+", choices=inits, default=inits, help="where chains start; of images vae")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="transitions of an update; default the data set's")
    parser.add_argument("--iterations", type=int, help="updates; default the data set's")
    parser.add_argument("--settings", nargs="+", default=[], metavar="NAME=VALUE", help="other settings of every run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and starts.json")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--write", metavar="BLOCK", help="put the table into that block of bench/RESULTS.md")
    arguments = parser.parse_args(argv)
    common = {k: v for k in ("data_dir", "steps", "iterations") if (v := getattr(arguments, k)) is not None}
    common |= {name: json.loads(value) for name, value in (text.split("=", 1) for text in arguments.settings)}
    if len({name in defaults.PLANES for name in arguments.data}) > 1:
        parser.error(f"data must be all in two dimensions or all images, got {' '.join(arguments.data)}")
    if arguments.data[0] not in defaults.PLANES and arguments.inits != ["vae"]:
        parser.error(f"inits must be vae for images, got {' '.join(arguments.inits)}")
    chosen = list(itertools.product(arguments.data, arguments.inits, arguments.seeds))
    resolved = {trial: settings_of(*trial, common) for trial in chosen}
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines: dict[tuple, dict[str, Any]] = {}
    turn = threading.Lock()

    def make(trial: tuple) -> None:
        directory = arguments.out / "-".join(map(str, trial))
        finished = train(resolved[trial], directory, arguments.threads)
        with turn:
            lines[trial] = measured(directory, resolved[trial], finished)
            print(json.dumps(lines[trial]), file=sys.stderr, flush=True)

    torch.set_num_threads(arguments.threads)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(make, trial) for trial in chosen]:
            done.result()
    found = [lines[trial] for trial in chosen]
    report.replace(arguments.out / "starts.json", json.dumps(found, indent=1) + "\n")
    text = markdown(found, len(arguments.seeds))
    print(text)
    if arguments.write:
        report.write(text, arguments.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
