"""How good a trained run is: `python -m fastanila.evaluate RUN` prints one JSON object.

Two dimensions: nll (the data's, held out, under the normalised model), entropy (the data's: the least nll there is),
gap, kl, tv (model against data density), boundary_mass, all by quadrature, with quadrature_error; and total variation,
sliced Wasserstein distance and MMD of the chains, to the data (tv_chains, sw_chains, mmd_chains) and to the model's own
law (tv_chains_model, ...), each beside what exact draws of their number give (..._floor): see `exact.evaluate`. Images:
Frechet distances to held-out images on principal components: of the chains, of where they started, and of baselines.

With --chains the run's sampler goes on from its chains on the fixed energy, and "chains" says how well it mixes (rhat,
ess_bulk, ess_tail, ess_per_gradient, autocorrelation_time, acceptance: the worst of the energy and the elements, or of
fixed projections for images; see `fastanila.diagnostics`); RUN/chains.png shows the autocorrelation and the energy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, checks, data, diagnostics, distances, exact, ops, plots, runs

_MOST_CHAINS = 256  # that `mixing` runs


def evaluate(run: runs.Run, *, data_dir: str | None = None) -> dict[str, float]:
    """The numbers above, as Python floats. Raises FileNotFoundError where a run's images are not there."""
    device = run.chains.device
    settings = run.settings
    dataset = data.load(
        settings.data,
        data_dir=data_dir if data_dir is not None else settings.data_dir,
        size=settings.image_size,
        channels=settings.channels,
        device=device,
    )
    report: dict[str, float] = {"iteration": run.iteration}
    if isinstance(dataset, data.Density):
        return report | exact.evaluate(run.energy, dataset, run.chains, device=device)

    def scaled(pixels):
        return pixels.float() / 127.5 - 1

    started = runs.build_start(settings, dataset, device)
    start = started.tensors().get("population", started.draw(0))
    return report | distances.evaluate_images(run.chains, scaled(dataset.held_out), scaled(dataset.train), start)


def mixing(run: runs.Run, draws: int = 1000, *, seed: int = 0, fused: bool = True) -> tuple[dict, diagnostics.Trace]:
    """`diagnostics.Diagnostics`, as a dictionary, of ``draws`` transitions from where the run left its chains, and
    their trace.

    At most 256 of the chains, evenly spaced, none left out at the start: what has not settled raises rhat. The gain of
    refresh="update" is taken anew after every ``steps`` of the run's settings, as in training. Raises
    ModuleNotFoundError without the extra "diagnostics", ValueError for fewer than 2 chains or 4 draws.
    """
    checks.count("draws", draws, least=4)
    diagnostics.arviz()  # ahead of the work
    z = exact.spaced(run.chains, _MOST_CHAINS)
    if len(z) < 2:
        raise ValueError(f"diagnostics need at least 2 chains, and the run has {len(z)}")
    step = runs.updates_past(run) * run.settings.steps
    with runs.matmul_precision(run.settings.precision), contextlib.nullcontext() if fused else ops.plain():
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
    parser = argparse.ArgumentParser(
        prog="python -m fastanila.evaluate", description="Evaluate a trained run; prints one JSON object."
    )
    parser.add_argument("run", help="run directory")
    parser.add_argument("--data-dir", help="folder of the images, if they have moved since the run")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--chains", action="store_true", help="how well the chains mix (needs the diagnostics extra)")
    parser.add_argument("--draws", type=int, default=1000, help="transitions that --chains makes (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="names the noise of --chains")
    parser.add_argument(
        "--fused", action=argparse.BooleanOptionalAction, default=True, help="compile the transition of --chains"
    )
    arguments = parser.parse_args(argv)
    try:
        run = runs.load(arguments.run, arguments.device)
        chains: dict[str, Any] = {}
        if arguments.chains:
            found, trace = mixing(run, arguments.draws, seed=arguments.seed, fused=arguments.fused)
            title = f"{arguments.run}: {found['chains']} chains, {type(run.sampler).__name__}"
            save_mixing(Path(arguments.run) / "chains.png", found, trace, title)
            chains = {"chains": _finite(found)}
        report = evaluate(run, data_dir=arguments.data_dir)
    except (ValueError, OSError, ModuleNotFoundError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"run": str(arguments.run), **_finite(report), **chains}, indent=2))
    return 0


def _finite(report: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN or infinity."""
    return {k: v if math.isfinite(v) else None for k, v in report.items()}


if __name__ == "__main__":
    sys.exit(main())
