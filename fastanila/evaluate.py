"""How good a trained run is: `python -m fastanila.evaluate RUN` prints one JSON object.

Two dimensions: nll (the data's, held out, under the normalised model), entropy (the data's: the least nll there is),
gap, kl, tv (model against data density), boundary_mass, all by quadrature, and tv_chains, tv_chains_floor (the chains'
histogram against the data's, and what exact draws of their number would give). Images: Frechet distances to held-out
images on principal components: of the chains, of where they started, and of baselines.
"""

from __future__ import annotations

import argparse
import json
import math
import sys

from . import checkpoint, data, distances, exact, runs


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastanila.evaluate", description="Evaluate a trained run; prints one JSON object."
    )
    parser.add_argument("run", help="run directory")
    parser.add_argument("--data-dir", help="folder of the images, if they have moved since the run")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    arguments = parser.parse_args(argv)
    try:
        run = runs.load(arguments.run, arguments.device)
        report = evaluate(run, data_dir=arguments.data_dir)
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # JSON has no NaN or infinity
    finite = {k: v if math.isfinite(v) else None for k, v in report.items()}
    print(json.dumps({"run": str(arguments.run), **finite}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
