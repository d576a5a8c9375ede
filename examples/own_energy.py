"""Any callable as an energy, any sampler, and how well the chains mix: Rosenbrock's banana."""

import argparse

import torch

from fastanila import HMC, MALA, AdjustedAniLA
from fastanila.evaluation import diagnostics

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--draws", type=int, default=500)
parser.add_argument("--chains", type=int, default=200)
parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
parser.add_argument("--out", default="own_energy.png", help="picture to write")
arguments = parser.parse_args()


def energy(z):
    """(B, 2) -> (B,): exp(-U) is a normal x, and a y that is normal about x^2."""
    x, y = z.unbind(-1)
    return 0.5 * x.square() + 2 * (y - x.square()).square()


start, how = torch.randn(arguments.chains, 2), dict(compile=arguments.compile)
found = {}
for sampler in (AdjustedAniLA(threshold=10.0, step_size=0.05), MALA(step_size=0.05), HMC(step_size=0.05)):
    # finds a step size, and freezes it; then draws, with what R-hat and the effective sample size need
    sampler, z = sampler.adapt(energy, start, steps=arguments.draws // 2, seed=0, **how)
    trace = diagnostics.trace(sampler, energy, z, draws=arguments.draws, seed=1, **how)
    told = diagnostics.diagnose(trace.values, gradients=sampler.gradients, acceptance=trace.acceptance)
    name = type(sampler).__name__
    print(f"{name}: step {sampler.step_size:.3g}, R-hat {told.rhat:.3f}, effective samples {told.ess_bulk:.0f}")
    found[name] = sampler.run(energy, z, steps=50, seed=2, **how)

from matplotlib.figure import Figure  # noqa: E402

figure = Figure(figsize=(9, 3.2), layout="constrained")
for axis, (name, states) in zip(figure.subplots(1, 3), found.items(), strict=True):
    axis.scatter(*states.detach().T, s=3, linewidths=0)
    axis.set(xlim=(-3.5, 3.5), ylim=(-1.5, 8), title=name)
figure.savefig(arguments.out, dpi=80)
print(f"the picture is in {arguments.out}")
