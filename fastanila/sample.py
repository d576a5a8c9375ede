"""Draw from a trained run: `python -m fastanila.sample RUN --count 64 --out samples.png` (or .npz).

A run with init=vae draws pairs, proposal above revision; --steps 0 gives the decoder's proposals alone, --interpolate
what lies between latents, --reconstruct held-out images and what the VAE makes of them. --inpaint REGION fills a region
of held-out images by a model of whole images; a run with task=completion completes the region that it has learned to.
"""

from __future__ import annotations

if __name__ == "__main__":  # ahead of torch, which takes seconds to import
    from .cli.exits import end_at_once_on_interrupt

    end_at_once_on_interrupt()

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import checks, files, generate
from .cli import exits
from .cli.flags import given, refuse
from .data import completion
from .evaluation import distances, plots, vectors
from .generate import sample
from .samplers import chain
from .training import build, checkpoint, config, needs, run_directory
from .training.run import Run, box_of, data_of, load, updates_past, with_sampler
from .training.settings import names_of

SUFFIXES = (".png", ".npz")
_OF_SAMPLER = ("step_size", "threshold", "norm", "leapfrog_steps")
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
    content = io.BytesIO()
    np.savez_compressed(
        content, **{k: (v if v.dtype == torch.bool else v.float()).cpu().numpy() for k, v in arrays.items()}
    )
    files.write_bytes(path, content.getvalue())


def draw(run: Run, arguments: argparse.Namespace, out: Path) -> str:
    """Draw what the arguments ask for, write it, and say what it is. Raises ValueError for what the run has not."""
    how = dict(steps=arguments.steps, seed=arguments.seed, fused=arguments.fused, warm_up=arguments.warm_up)
    count, settings = arguments.count, run.settings
    for flag in ("interpolate", "reconstruct"):
        if getattr(arguments, flag) and (run.vae is None or run.vae.conditional):
            got = f"init={settings.init} and task={settings.task}"
            raise ValueError(f"{flag} needs a run with init=vae and task=generation, got one with {got}")
    plain = not (arguments.interpolate or arguments.reconstruct or arguments.inpaint or settings.task == "completion")
    if arguments.start and not plain:
        raise ValueError(f"start is for plain samples, and none are drawn here; got {arguments.start}")
    if arguments.inpaint or settings.task == "completion":
        dataset = data_of(run, arguments.data_dir)
        found = generate.completions(run, dataset, count, region=arguments.inpaint, each=arguments.completions, **how)
        write_completed(out, found, run)
        mse, psnr = distances.errors(found.truth, found.missing, found.completions, box_of(run))
        return f"{count} images, each completed {arguments.completions} times (mse {mse:.4f}, psnr {psnr:.2f} dB)"
    if arguments.interpolate:
        rows = -(-count // _COLUMNS)
        update = updates_past(run)
        z = generate.interpolated(run.vae, rows, _COLUMNS, seed=arguments.seed, update=update)
        write(out, generate.moved(run, z, **how | {"steps": arguments.steps or 0}), run)
        return f"{rows} interpolations of {_COLUMNS} proposals"
    if arguments.reconstruct:
        dataset = data_of(run, arguments.data_dir)
        update, device = updates_past(run), run.chains.device
        x = dataset.draw(count, seed=arguments.seed, step=update, purpose="held-out", device=device)
        back = generate.reconstructed(run.vae, x)
        write_pairs(out, run, truth=x, reconstructions=back)
        error = 0.5 * (back - x).square().flatten(1).sum(1).mean()
        return f"{count} held-out draws above their reconstructions (reconstruction {error:.4f})"
    z = sample(run, count, start=arguments.start, **how)
    if run.vae is not None and arguments.start in (None, "vae") and arguments.steps != 0:
        proposals = sample(run, count, start="vae", steps=0, seed=arguments.seed)
        write_pairs(out, run, proposals=proposals, samples=z)
    else:
        write(out, z, run)
    return f"{len(z)} samples"


def main(argv: list[str] | None = None) -> int:
    samplers = names_of("sampler")
    parser = argparse.ArgumentParser(
        prog="python -m fastanila.sample", description="Draw samples from a trained run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", help="run directory")
    parser.add_argument("--count", type=int, default=64, help="samples to draw, or images to complete")
    parser.add_argument("--out", default="samples.png", help="file to write: .png (a picture) or .npz (key samples)")
    parser.add_argument(
        "--steps", type=int,
        help="transitions; default: the run's K, and ten K from noise (also to inpaint); 0 with a VAE: its proposals",
    )  # fmt: skip
    parser.add_argument(
        "--start",
        choices=generate.STARTS,
        help="where the samples start; default: at the run's VAE if it has one, or chains",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--interpolate", action="store_true", help="proposals between latents, a row a pair (init=vae)")
    what.add_argument("--reconstruct", action="store_true", help="held-out data above their reconstructions (init=vae)")
    what.add_argument(
        "--inpaint", choices=completion.REGIONS, help="fill a region of held-out images, all else held (images)"
    )
    parser.add_argument("--completions", type=int, default=4, help="completions of each image")
    parser.add_argument("--data-dir", help="folder of the images, if they have moved since the run")
    parser.add_argument("--sampler", choices=samplers, help="another sampler than the run's")
    parser.add_argument("--step-size", type=float, help="its step size; default: as the run's")
    parser.add_argument("--threshold", type=float, help="its threshold; default: as the run's")
    parser.add_argument("--norm", choices=names_of("norm"), help="its norm; default: as the run's")
    parser.add_argument("--leapfrog-steps", type=int, help="leapfrog steps of hmc")
    parser.add_argument(
        "--warm-up", type=int, default=0, help="transitions in which an exact sampler adapts its step size"
    )
    parser.add_argument("--seed", type=int, default=0, help="names the noise")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True, help="compile the transition")

    def work() -> int:
        arguments = parser.parse_args(argv)
        return sampled(arguments, given(parser, argv, arguments))

    return exits.exit_code(work)


def sampled(arguments: argparse.Namespace, given: set[str]) -> int:
    """Draw and write what the arguments ask for; the exit code. ``given``: those that the command line has."""
    changes = {k: v for k in _OF_SAMPLER if (v := getattr(arguments, k)) is not None}
    with exits.refusing(ValueError, TypeError, checkpoint.CheckpointError):
        out = out_of(arguments.out)
        for name, least in (("count", 1), ("completions", 1), ("warm_up", 0)):
            checks.count(name, getattr(arguments, name), least)
        if arguments.steps is not None:
            checks.count("steps", arguments.steps, least=0)
        run = load(arguments.run, arguments.device)
        check_effects(run, arguments, given)
        if changes or arguments.sampler is not None:
            run = with_sampler(run, arguments.sampler or run.settings.sampler, **changes)
    exits.say(chain.path(run.sampler, run.energy, run.chains, fused=arguments.fused))
    out.parent.mkdir(parents=True, exist_ok=True)
    run_directory.check_writable(out.parent)
    with exits.refusing(ValueError), build.arithmetic(run.settings.precision):
        drawn = draw(run, arguments, out)
    exits.say(f"{drawn} in {out}")
    return exits.DONE


def check_effects(run: Run, arguments: argparse.Namespace, given: set[str]) -> None:
    """Raise ValueError naming an argument of the command line that would change nothing."""
    fills = bool(arguments.inpaint) or run.settings.task == "completion"
    if not fills:
        refuse(given, ["completions"], "where nothing is completed: it needs inpaint, or a run with task=completion")
    if not (fills or arguments.reconstruct):
        refuse(given, ["data_dir"], "where no data are read: it needs inpaint, reconstruct or task=completion")
    for reason in needs.idle(run.settings, given & {"data_dir"}).values():
        raise ValueError(reason)
    moves = ("sampler", *_OF_SAMPLER)
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
