"""Draw from a trained run: `python -m fastanila.sample RUN --count 64 --out samples.png` (or .npz).

A run with init=vae draws pairs, proposal above revision; --steps 0 gives the decoder's proposals alone, --interpolate
what lies between latents, --reconstruct held-out images and what the VAE makes of them. --inpaint REGION fills a region
of held-out images by a model of whole images; a run with task=completion completes the region that it has learned to.
"""

from __future__ import annotations

if __name__ == "__main__":  # ahead of torch, which takes seconds to import
    from .cli import exits, parsers

    exits.begin(parsers.sample())

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks, files, generate
from .cli import exits, parsers
from .cli.flags import refuse
from .data import classes
from .evaluation import distances, plots, vectors
from .generate import sample
from .samplers import chain
from .training import build, checkpoint, config, needs, run_directory
from .training.run import Run, box_of, data_of, load, updates_past, with_sampler

SUFFIXES = (".png", ".npz")
_OF_SAMPLER = ("step_size", "threshold", "norm", "leapfrog_steps")
_TRADING = ("samples", "pairs")  #: of `MODES`, those of whose states replicas can trade places
_COLUMNS = 8  # of a picture of interpolations


def write(path: Path, z: Tensor, run: Run) -> None:
    """A picture of the samples (.png: a grid of images, or a scatter with the density), or the samples (.npz)."""
    if path.suffix.lower() == ".npz":
        write_arrays(path, samples=z)
    elif z.dim() == 2:
        write_vectors(path, run, z, f"{run.settings.data}, {len(z)} samples")
    else:
        plots.save_images(path, z, box_of(run))


def write_vectors(
    path: Path, run: Run, z: Tensor, title: str, proposals: Tensor | None = None, names: tuple[str, str] | None = None
) -> None:
    """A scatter of states (N, D) beside the data, in two dimensions with the density."""
    dataset = data_of(run)
    if dataset.shape == (2,):
        plots.save_plane(path, run.energy, dataset, z, title, proposals=proposals, names=names)
    else:
        vectors.save_pairs(path, dataset, z, title, proposals)


def write_pairs(path: Path, run: Run, **pair: Tensor) -> None:
    """Two sets of as many states, by name: the first above the second, or beside it; .npz: both."""
    above, below = pair.values()
    if path.suffix.lower() == ".npz":
        write_arrays(path, **pair)
    elif below.dim() == 2:
        title = f"{run.settings.data}, {len(below)} {list(pair)[1]}"
        write_vectors(path, run, below, title, above, tuple(pair))
    else:
        plots.save_under(path, (above, below), box_of(run))


def write_completed(path: Path, found: generate.Completed, run: Run) -> None:
    """A row an image: with the region blank, the VAE's first proposal if there is one, the completions, the truth.
    .npz: samples, truth, missing, and proposals if there are any."""
    if path.suffix.lower() == ".npz":
        others = {k: v for k, v in found._asdict().items() if v is not None and k != "completions"}
        write_arrays(path, samples=found.completions, **others)
        return
    blank = torch.where(found.missing, 0.0, found.truth)
    first = [] if found.proposals is None else [found.proposals[:, :1]]
    rows = torch.cat([blank[:, None], *first, found.completions, found.truth[:, None]], 1)
    plots.save_images(path, rows.flatten(0, 1), box_of(run), columns=rows.shape[1])


def write_arrays(path: Path, **arrays: Tensor) -> None:
    content = {k: (v.float() if v.is_floating_point() else v).cpu().numpy() for k, v in arrays.items()}
    files.write_by(path, lambda file: np.savez_compressed(file, **content))


def samples(run: Run, arguments: argparse.Namespace, out: Path) -> str:
    """States of the run's sampler. This and the next five write what they make, and return what it is, in words."""
    z = sample(run, arguments.count, start=arguments.start, **_transitions(arguments), **_replicas(arguments))
    write(out, z, run)
    return f"{len(z)} samples"


def by_class(run: Run, arguments: argparse.Namespace, out: Path) -> str:
    """Images of the classes that are asked for, or of all, equally many of each: a row a class, or .npz with labels."""
    wanted = range(run.classes) if arguments.classes is None else arguments.classes
    each = -(-arguments.count // len(wanted))
    labels = torch.tensor(wanted, dtype=torch.int64).repeat_interleave(each)
    z = sample(run, len(labels), start=arguments.start, labels=labels, **_transitions(arguments))
    if out.suffix.lower() == ".npz":
        write_arrays(out, samples=classes.images(z), labels=classes.labels(z))
    else:
        plots.save_images(out, classes.images(z), box_of(run), columns=each)
    return f"{each} samples of each of {len(wanted)} classes"


def pairs(run: Run, arguments: argparse.Namespace, out: Path) -> str:
    """What the run's VAE proposes, and where the sampler takes each proposal."""
    z = sample(run, arguments.count, start="vae", **_transitions(arguments), **_replicas(arguments))
    proposals = sample(run, arguments.count, start="vae", steps=0, seed=arguments.seed)
    write_pairs(out, run, proposals=proposals, samples=z)
    return f"{len(z)} samples"


def interpolations(run: Run, arguments: argparse.Namespace, out: Path) -> str:
    """Proposals on the way from one latent to another, a row a pair of latents; transitions only if asked for."""
    rows = -(-arguments.count // _COLUMNS)
    z = generate.interpolated(run.vae, rows, _COLUMNS, seed=arguments.seed, update=updates_past(run))
    write(out, generate.moved(run, z, **_transitions(arguments) | {"steps": arguments.steps or 0}), run)
    return f"{rows} interpolations of {_COLUMNS} proposals"


def reconstructions(run: Run, arguments: argparse.Namespace, out: Path) -> str:
    """Held-out data, and what the run's VAE makes of them."""
    how = dict(seed=arguments.seed, step=updates_past(run), purpose="held-out", device=run.chains.device)
    x = data_of(run, arguments.data_dir).draw(arguments.count, **how)
    back = generate.reconstructed(run.vae, x)
    write_pairs(out, run, truth=x, reconstructions=back)
    error = 0.5 * (back - x).square().flatten(1).sum(1).mean()
    return f"{arguments.count} held-out draws above their reconstructions (reconstruction {error:.4f})"


def completions(run: Run, arguments: argparse.Namespace, out: Path) -> str:
    """Held-out images of which a region is filled in."""
    dataset, each = data_of(run, arguments.data_dir), arguments.completions
    how = _transitions(arguments) | {"region": arguments.inpaint, "each": each}
    found = generate.completions(run, dataset, arguments.count, **how)
    write_completed(out, found, run)
    mse, psnr = distances.errors(found.truth, found.missing, found.completions, box_of(run))
    return f"{arguments.count} images, each completed {each} times (mse {mse:.4f}, psnr {psnr:.2f} dB)"


MODES = {f.__name__: f for f in (samples, by_class, pairs, interpolations, reconstructions, completions)}


def mode_of(run: Run, arguments: argparse.Namespace) -> str:
    """Which of `MODES` the arguments ask for. Raises ValueError if the run cannot do it."""
    settings = run.settings
    of_vae = "interpolate" if arguments.interpolate else "reconstruct" if arguments.reconstruct else None
    if of_vae and (run.vae is None or run.vae.conditional):
        got = f"init={settings.init} and task={settings.task}"
        raise ValueError(f"{of_vae} needs a run with init=vae and task=generation, got one with {got}")
    if arguments.inpaint or settings.task == "completion":
        mode = "completions"
    elif run.classes is not None:
        return "by_class"
    elif of_vae:
        mode = {"interpolate": "interpolations", "reconstruct": "reconstructions"}[of_vae]
    else:
        revises = run.vae is not None and arguments.start in (None, "vae") and arguments.steps != 0
        return "pairs" if revises else "samples"
    if arguments.start:
        raise ValueError(f"start is for plain samples, and none are drawn here; got {arguments.start}")
    return mode


def _transitions(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("steps", "seed", "fused", "warm_up")}


def _replicas(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("replicas", "highest")}


def main(argv: list[str] | None = None) -> int:
    return exits.run(parsers.sample(), argv, sampled, ValueError, TypeError, checkpoint.CheckpointError)


def sampled(arguments: argparse.Namespace, given: set[str]) -> int:
    """Write what the arguments ask for; the exit code. ``given``: those that the command line has."""
    changes = {k: v for k in _OF_SAMPLER if (v := getattr(arguments, k)) is not None}
    out = out_of(arguments.out)
    for name, least in (("count", 1), ("completions", 1), ("warm_up", 0), ("steps", 0)):
        if (value := getattr(arguments, name)) is not None:
            checks.count(name, value, least)
    if arguments.replicas is not None:
        checks.count("replicas", arguments.replicas)
    run = load(arguments.run, arguments.device)
    check_effects(run, arguments, given)
    if changes or arguments.sampler is not None:
        run = with_sampler(run, arguments.sampler or run.settings.sampler, **changes)
    trading = mode_of(run, arguments) in _TRADING and arguments.steps != 0
    sampler = generate.with_replicas(run, **_replicas(arguments)) if trading else run.sampler
    exits.say(chain.describe(sampler, run.energy, run.chains, fused=arguments.fused))
    out.parent.mkdir(parents=True, exist_ok=True)
    run_directory.check_writable(out.parent)
    with build.arithmetic(run.settings.precision):
        words = MODES[mode_of(run, arguments)](run, arguments, out)
    exits.say(f"{words} in {out}")
    return exits.DONE


def check_effects(run: Run, arguments: argparse.Namespace, given: set[str]) -> None:
    """Raise ValueError naming an argument of the command line that would change nothing."""
    fills = bool(arguments.inpaint) or run.settings.task == "completion"
    if run.classes is None or fills:
        refuse(given, ["classes"], "where no classes are drawn: it needs a run with classes, and no inpaint")
    if not fills:
        refuse(given, ["completions"], "where nothing is completed: it needs inpaint, or a run with task=completion")
    if not (fills or arguments.reconstruct):
        refuse(given, ["data_dir"], "where no data are read: it needs inpaint, reconstruct or task=completion")
    for reason in needs.idle(run.settings, given & {"data_dir"}).values():
        raise ValueError(reason)
    exchange = ("replicas", "highest")
    moves = ("sampler", *_OF_SAMPLER, *exchange)
    if mode_of(run, arguments) not in _TRADING:
        refuse(given, exchange, "where states cannot trade places: it needs plain samples of a run without classes")
    if (run.settings.replicas if arguments.replicas is None else arguments.replicas) == 1:
        refuse(given, ["highest"], "without replicas: it needs replicas above 1")
    if arguments.reconstruct:
        refuse(given, ["steps", "warm_up", *moves], "with reconstruct, which makes no transitions")
    if arguments.steps == 0 or (arguments.interpolate and arguments.steps is None):
        refuse(given, moves, "where no transitions are made: it needs steps above 0")


def out_of(written: str) -> Path:
    """The file to write. Raises ValueError where it can be none."""
    out = config.path_of("out", written)
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"out must end in {' or '.join(SUFFIXES)}, got {written}")
    if out.is_dir():
        raise ValueError(f"out must be a file, but {out} is a folder")
    return out


if __name__ == "__main__":
    sys.exit(main())
