"""Draw from a trained run: `python -m fastanila.sample RUN --count 64 --out samples.png` (or .npz)."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import chains, checkpoint, config, data, ops, plots, runs, transitions

SUFFIXES = (".png", ".npz")


def sample(
    run: runs.Run,
    count: int,
    *,
    steps: int | None = None,
    start: str = "chains",
    seed: int = 0,
    fused: bool = True,
    warm_up: int = 0,
) -> Tensor:
    """(count, ...) states of the run's sampler on its energy, on the run's device.

    ``start``: "chains" goes on from where training left its chains, over again where more are wanted, each copy with
    noise of its own; "noise" starts from uniform noise. ``steps``: transitions, by default as many as an update of
    the run made from chains, and ten times as many from noise. ``warm_up``: transitions ahead of them in which an exact
    sampler adapts its step size. ``fused=False`` runs the plain definition, eagerly. The law is the sampler's, see its
    docstring; `runs.with_sampler` changes it.
    """
    if warm_up and not run.sampler.is_exact:
        raise ValueError(f"warm_up adapts an exact sampler's step size, got sampler {run.settings.sampler}")
    updates = runs.updates_past(run)
    if start == "chains":
        z = run.chains[torch.arange(count, device=run.chains.device) % len(run.chains)]
        steps = run.settings.steps if steps is None else steps
    else:
        box = data.box_of(run.settings.data)
        shape = (count, *run.chains.shape[1:])
        z = chains.from_noise(shape, box, seed=seed, step=updates, device=run.chains.device)
        steps = 10 * run.settings.steps if steps is None else steps
    first = updates * run.settings.steps
    with runs.matmul_precision(run.settings.precision), contextlib.nullcontext() if fused else ops.plain():
        sampler = run.sampler
        if warm_up:
            sampler, z = sampler.adapt(run.energy, z, steps=warm_up, seed=seed, step=first, compile=fused)
        return sampler.run(run.energy, z, steps=steps, seed=seed, step=first + warm_up, compile=fused)


def write(path: Path, z: Tensor, run: runs.Run) -> None:
    """A picture of the samples (.png: a grid of images, or a scatter with the density), or the samples (.npz)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        content = io.BytesIO()
        np.savez_compressed(content, samples=z.float().cpu().numpy())
        checkpoint.write_bytes(path, content.getvalue())
    elif z.dim() == 2:
        plots.save_plane(path, run.energy, data.load(run.settings.data), z, f"{run.settings.data}, {len(z)} samples")
    else:
        plots.save_images(path, z, data.box_of(run.settings.data))


def main(argv: list[str] | None = None) -> int:
    samplers = config.names_of("sampler")
    parser = argparse.ArgumentParser(
        prog="python -m fastanila.sample", description="Draw samples from a trained run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", help="run directory")
    parser.add_argument("--count", type=int, default=64, help="samples to draw")
    parser.add_argument("--out", default="samples.png", help="file to write: .png (a picture) or .npz (key samples)")
    parser.add_argument("--steps", type=int, help="transitions; default: the run's K from chains, ten K from noise")
    parser.add_argument("--start", choices=("chains", "noise"), default="chains", help="where the samples start")
    parser.add_argument("--sampler", choices=samplers, help="another sampler than the run's")
    parser.add_argument("--step-size", type=float, help="its step size; default: as the run's")
    parser.add_argument("--threshold", type=float, help="its threshold; default: as the run's")
    parser.add_argument("--norm", choices=config.names_of("norm"), help="its norm; default: as the run's")
    parser.add_argument("--leapfrog-steps", type=int, help="leapfrog steps of hmc")
    parser.add_argument(
        "--warm-up", type=int, default=0, help="transitions in which an exact sampler adapts its step size"
    )
    parser.add_argument("--seed", type=int, default=0, help="names the noise")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True, help="compile the transition")
    arguments = parser.parse_args(argv)
    changes = ("step_size", "threshold", "norm", "leapfrog_steps")
    changes = {k: v for k in changes if (v := getattr(arguments, k)) is not None}
    try:
        out = Path(arguments.out)
        if out.suffix not in SUFFIXES:
            raise ValueError(f"out must end in {' or '.join(SUFFIXES)}, got {arguments.out}")
        if arguments.count < 1:
            raise ValueError(f"count must be at least 1, got {arguments.count}")
        if arguments.steps is not None and arguments.steps < 0:
            raise ValueError(f"steps must be at least 0, got {arguments.steps}")
        if arguments.warm_up < 0:
            raise ValueError(f"warm_up must be at least 0, got {arguments.warm_up}")
        run = runs.load(arguments.run, arguments.device)
        if changes or arguments.sampler is not None:
            run = runs.with_sampler(run, arguments.sampler or run.settings.sampler, **changes)
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(transitions.path(run.sampler, run.energy, run.chains, fused=arguments.fused))
    try:
        z = sample(
            run, arguments.count, steps=arguments.steps, start=arguments.start, seed=arguments.seed,
            fused=arguments.fused, warm_up=arguments.warm_up,
        )  # fmt: skip
        write(out, z, run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {out}: {error}", file=sys.stderr)
        return 2
    print(f"{len(z)} samples in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
