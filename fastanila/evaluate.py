"""How good a trained run is: `python -m fastanila.evaluate RUN` prints one JSON object.

Two dimensions: nll (the data's, held out, under the normalised model), entropy (the data's: the least nll there is),
gap, kl, tv (model against data density), boundary_mass, all by quadrature, with quadrature_error; and total variation,
sliced Wasserstein distance and MMD of the chains, to the data (tv_chains, sw_chains, mmd_chains) and to the model's own
law (tv_chains_model, ...), each beside what exact draws of their number give (..._floor): see `plane.evaluate`. Images:
kid, frechet, precision, recall, density and coverage to held-out images by a network's features (kid_start: of where
the chains started), whether samples are copies of training images, and all that of baselines:
`evaluation.features.evaluate_images` says what each is. --fid adds the FID of papers. And how well the energy tells
held-out images from others (auroc_...: see `evaluation.ood`), with --ood from those of another data set too. With
classes: how the energies classify held-out images (class_accuracy, ...: see `classified`).
Vectors of your own: distances of the chains to held-out ones, and in two dimensions nll: see `vectors.evaluate`.

A run with init=vae is judged by fresh pairs of a proposal and what K transitions make of it: the numbers of chains are
those of the revised states, kid_start and frechet_start those of the proposals; energy_proposals, energy_revised and
moved (how far an element moves) say what the revision does, and tv_proposals_model how far proposals are from the
model's law. A run with task=completion: errors in the missing regions, see `completed`. Densities with modes:
modes_covered_model and modes_covered_chains.

With --likelihood "likelihood" has the model's log Z and the held-out data's NLL by annealing, from below and above: see
`training.likelihood`. With --chains the run's sampler goes on from its chains on the fixed energy, and "chains"
says how well it mixes (rhat, ess_bulk, ess_tail, ess_per_gradient, autocorrelation_time, acceptance: the worst of the
energy and the elements, or of fixed projections for images; see `evaluation.diagnostics`); RUN/chains.png shows the
autocorrelation and the energy.
"""

from __future__ import annotations

if __name__ == "__main__":  # ahead of torch, which takes seconds to import
    from .cli import exits, parsers

    exits.begin(parsers.evaluate())

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checks, generate
from .cli import exits, parsers
from .cli.flags import refuse
from .data import Images, Vectors, classes, completion, densities
from .data.images import from_pixels, to_pixels
from .evaluation import diagnostics, distances, features, inception, ood, plane, plots, vectors
from .models.wrappers import energies_by_class, marginal
from .training import build, checkpoint, config, needs, run_directory
from .training.likelihood import likelihood_of
from .training.run import Run, data_of, load, updates_past

_MOST_CHAINS = 256  # that `mixing` runs
_PLANE_PAIRS, _IMAGE_PAIRS = 10_000, 1024  # drawn where a VAE proposes
_COMPLETIONS = 8  # of an image
_BATCH = 1024  # states whose energy is taken at a time


def evaluate(
    run: Run, *, data_dir: str | None = None, other: str | None = None, fused: bool = True, count: int = 2000,
    fid: bool = False, descent: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The numbers above, as Python has them. Of images at most ``count`` of each set are compared; ``fid`` adds FID.
    ``descent``: images of the chains are compared after so many transitions without noise (`generate.descended`).
    ``other``: images that the energy is to tell from the run's (`ood.load`).

    Raises FileNotFoundError where images are not there, ValueError for ``other`` images of which the run can tell
    nothing, ModuleNotFoundError where images are compared by a network whose package is missing, and OSError for a FID
    whose weights cannot be had.
    """
    if other is not None and (run.chains.dim() != 4 or run.settings.task == "completion"):
        raise ValueError(f"ood needs a run that generates images, got data={run.settings.data}, {run.settings.task}")
    with build.arithmetic(run.settings.precision):
        return _evaluate(run, data_dir, other, fused, count, fid, descent)


def _evaluate(
    run: Run, data_dir: str | None, other: str | None, fused: bool, count: int, fid: bool, descent: int
) -> dict[str, Any]:
    device, settings = run.chains.device, run.settings
    dataset = data_of(run, data_dir)
    report: dict[str, Any] = {"iteration": run.iteration}
    if settings.task == "completion":
        return report | completed(run, dataset, fused=fused)
    in_plane, of_vectors = isinstance(dataset, densities.Density), isinstance(dataset, Vectors)
    held = dataset.images if isinstance(dataset, classes.ByClass) else dataset
    if not in_plane and not of_vectors:
        _check_counts(run, held)
        if fid:
            inception.torch_fidelity()  # ahead of the work
    chains, start = run.chains, None
    if run.vae is not None:
        start, chains = generate.pairs(run, _PLANE_PAIRS if in_plane or of_vectors else _IMAGE_PAIRS, fused=fused)
        report |= revision(run.energy, start, chains)
    if in_plane:
        if start is not None:
            report["tv_proposals_model"] = plane.law_tv(run.energy, dataset, start)
        return report | plane.evaluate(run.energy, dataset, chains, device=device)
    if of_vectors:
        return report | vectors.evaluate(run.energy, dataset, chains)
    if start is None:
        started = build.build_start(settings, dataset, device)
        start = started.tensors().get("population", started.draw(0))[: settings.chains]
    chains = generate.descended(run, chains, descent, fused=fused)
    energy = run.energy
    if run.classes is not None:
        report |= classified(run.energy, held)
        energy, chains, start = marginal(run.energy), classes.images(chains), classes.images(start)
    outliers = None if other is None else ood.load(other, held.shape, device=device)
    report |= ood.evaluate(energy, held, outliers)
    labels = dict(train_labels=held.train_labels, held_out_labels=held.held_out_labels)
    sets = chains, held.held_out, held.train, start
    report |= features.evaluate_images(*sets, box=held.box, count=count, **labels)
    return report | ({"fid": inception.fid(to_pixels(chains, held.box), held.held_out)} if fid else {})


@torch.no_grad()
def classified(energy: Callable[..., Tensor], images: Images) -> dict[str, float]:
    """How the energies of every class, U(x, y), classify the held-out images.

    class_accuracy: the share of those whose own class has the least energy. class_cross_entropy: the mean of
    -log p(y | x), nats, where p(y | x) = softmax of -U. class_accuracy_centred: the accuracy where from the energies
    of each class the mean energy of its own training images is taken off. The chains of a class compare its energies
    with one another only, and leave a constant of each class open, its log Z; the cross-entropy alone learns it.
    """

    def of_all(pixels: Tensor) -> Tensor:
        return torch.cat([energies_by_class(energy, from_pixels(part)) for part in pixels.split(_BATCH)])

    each, y = of_all(images.held_out), images.held_out_labels
    own, labels = of_all(images.train), images.train_labels
    means = torch.stack([own[labels == i, i].mean() for i in range(own.shape[1])]).nan_to_num()  # none: of no image
    return {
        "class_accuracy": (each.argmin(1) == y).float().mean().item(),
        "class_accuracy_centred": ((each - means).argmin(1) == y).float().mean().item(),
        "class_cross_entropy": torch.nn.functional.cross_entropy(-each, y).item(),
    }


def _check_counts(run: Run, images: Images) -> None:
    """Raise ValueError, ahead of the work, where there are too few images for a Frechet distance."""
    counts = [("training image", len(images.train)), ("held-out image", len(images.held_out))]
    if run.vae is None:
        counts.append(("chain", len(run.chains)))
    for name, count in counts:
        if count < 2:
            raise ValueError(f"evaluation needs at least 2 {name}s, and there is {count}{_advice(run, name)}")


def _advice(run: Run, lacking: str) -> str:
    if run.settings.data != "image-folder" or lacking == "chain":
        return ""
    return " (of a folder without test/ or val/ every tenth image is held out: 11 are the fewest that do)"


@torch.no_grad()
def revision(energy: Callable[[Tensor], Tensor], proposals: Tensor, revised: Tensor) -> dict[str, float]:
    """Mean energies, and how far the sampler moves an element of a proposal (root mean square)."""

    def mean(z: Tensor) -> float:
        return torch.cat([energy(part) for part in z.split(_BATCH)]).mean().item()

    moved = (revised - proposals).square().mean().sqrt().item()
    return {"energy_proposals": mean(proposals), "energy_revised": mean(revised), "moved": moved}


def completed(run: Run, dataset: completion.Completions, *, count: int = 200, fused: bool = True) -> dict[str, float]:
    """Errors in the regions of held-out images: mse_... (squared units of data) and psnr_... (dB, `distances.errors`).

    vae: the proposals; revised: where the sampler takes them; mean: the mean training image in the region. Each image
    is completed 8 times: the errors are the completions' own, and those of ..._average are of the mean of the 8, which
    is what a regression would be after. diversity_vae, diversity_revised: the standard deviation between the
    completions of an image (root mean square over the region's elements).
    """
    found = generate.completions(run, dataset, count, each=_COMPLETIONS, fused=fused)
    mean = from_pixels(dataset.images.train.float().mean(0).to(run.chains.device))
    inside = found.missing.expand_as(found.truth)
    report = {}
    sets = {"vae": found.proposals, "revised": found.completions, "mean": mean.expand_as(found.truth)[:, None]}
    for name in ("vae", "revised"):
        sets[f"{name}_average"] = sets[name].mean(1, keepdim=True)
        spread = sets[name].var(1)[inside].mean().sqrt().item()
        report[f"diversity_{name}"] = spread
    for name, made in sets.items():
        report[f"mse_{name}"], report[f"psnr_{name}"] = distances.errors(found.truth, found.missing, made, dataset.box)
    return report


def mixing(run: Run, draws: int = 1000, *, seed: int = 0, fused: bool = True) -> tuple[dict, diagnostics.Trace]:
    """`diagnostics.Diagnostics`, as a dictionary, of ``draws`` transitions from where the run left its chains, and
    their trace.

    At most 256 of the chains, evenly spaced, none left out at the start: what has not settled raises rhat. The gain of
    refresh="update" is taken anew after every ``steps`` of the run's settings, as in training. Raises
    ModuleNotFoundError without the extra "diagnostics", ValueError for fewer than 2 chains or 4 draws.
    """
    checks.count("draws", draws, least=4)
    if run.settings.task == "completion":
        raise ValueError("task of the run must be generation for diagnostics: chains of completions have no common law")
    if run.classes is not None:
        raise ValueError("diagnostics need chains of one law, and those of a run with classes have one for each class")
    diagnostics.arviz()  # ahead of the work
    z = plane.spaced(run.chains, _MOST_CHAINS)
    if len(z) < 2:
        raise ValueError(f"diagnostics need at least 2 chains, and the run has {len(z)}")
    step = updates_past(run) * run.settings.steps
    with build.arithmetic(run.settings.precision, fused=fused):
        trace = diagnostics.trace(
            run.sampler, run.energy, z, draws=draws, seed=seed, step=step, block=run.settings.steps, compile=fused
        )
    found = diagnostics.diagnose(trace.values, gradients=run.sampler.gradients, acceptance=trace.acceptance)
    return found._asdict(), trace


def save_mixing(path: Path, found: dict[str, Any], trace: diagnostics.Trace, title: str) -> None:
    """The autocorrelation up to five times its time, and the energy's trace."""
    rho = diagnostics.autocorrelation(trace.values)
    time = found["autocorrelation_time"]
    lags = max(20, math.ceil(5 * time)) if math.isfinite(time) else len(rho)
    plots.save_chains(path, rho[: lags + 1], trace.values, trace.names, title)


def main(argv: list[str] | None = None) -> int:
    return exits.run(
        parsers.evaluate(), argv, evaluated, ValueError, TypeError, ModuleNotFoundError, checkpoint.CheckpointError
    )


def evaluated(arguments: argparse.Namespace, given: set[str]) -> int:
    """Print what the arguments ask for; the exit code. ``given``: those that the command line has."""
    if not arguments.chains:
        refuse(given, ["draws"], "without chains, whose transitions it is of")
    annealing = ["annealing_sampler", "annealing_chains", "temperatures", "settle"]
    if not arguments.likelihood:
        refuse(given, annealing, "without likelihood, which it is of")
    if not (arguments.chains or arguments.likelihood):
        refuse(given, ["seed"], "without chains or likelihood, whose noise it names")
    run = load(arguments.run, arguments.device)
    for reason in needs.idle(run.settings, given & {"data_dir"}).values():
        raise ValueError(reason)
    if run.settings.task == "completion" or run.chains.dim() != 4:
        refuse(given, ["count", "fid", "descent"], "but on a model of whole images")
    checks.count("descent", arguments.descent, least=0)
    beside: dict[str, Any] = {}
    if arguments.chains:
        directory = config.path_of("run", arguments.run)
        run_directory.check_writable(directory)
        found, trace = mixing(run, arguments.draws, seed=arguments.seed, fused=arguments.fused)
        title = f"{arguments.run}: {found['chains']} chains, {type(run.sampler).__name__}"
        save_mixing(directory / "chains.png", found, trace, title)
        beside["chains"] = _finite(found)
    if arguments.likelihood:
        found = likelihood_of(
            run, data_dir=arguments.data_dir, sampler=arguments.annealing_sampler, seed=arguments.seed,
            fused=arguments.fused, chains=arguments.annealing_chains, temperatures=arguments.temperatures,
            settle=arguments.settle,
        )  # fmt: skip
        beside["likelihood"] = _finite(found)
    options = dict(
        other=arguments.ood,
        data_dir=arguments.data_dir,
        fused=arguments.fused,
        count=arguments.count,
        fid=arguments.fid,
        descent=arguments.descent,
    )
    report = evaluate(run, **options)
    exits.say(json.dumps({"run": str(arguments.run), **_finite(report), **beside}, indent=2))
    return exits.DONE


def _finite(report: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return _finite(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in report.items()}


if __name__ == "__main__":
    sys.exit(main())
