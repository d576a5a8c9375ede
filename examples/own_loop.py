"""The operator in a hand-written loop: 2,000 chains fall into eight modes, in seconds."""

import argparse

import torch

from fastanila.models.energies import GaussianMixture
from fastanila.ops import anisotropic_step

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--out", default="own_loop.png", help="picture to write")
arguments = parser.parse_args()

angles = torch.arange(8) * torch.pi / 4
energy = GaussianMixture(3 * torch.stack((angles.cos(), angles.sin()), 1), sd=0.4)

z = torch.rand(2000, 2) * 8 - 4
shown = {0: z}
for t in range(arguments.steps):
    x = z.requires_grad_()
    (gradient,) = torch.autograd.grad(energy(x).sum(), x)
    # the score is the gradient of the log density, -U; (seed, step) name the noise
    z = anisotropic_step(x.detach(), -gradient, threshold=10.0, step_size=0.02, seed=0, step=t)
    if t + 1 in (20, arguments.steps):
        shown[t + 1] = z
print(f"mean energy {energy(z).mean():.3f}, of exact draws {energy(energy.sample(2000, seed=1)).mean():.3f}")

from matplotlib.figure import Figure  # noqa: E402

figure = Figure(figsize=(3 * len(shown), 3.2), layout="constrained")
for axis, (t, states) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
    axis.scatter(*states.detach().T, s=1, linewidths=0)
    axis.set(xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal", title=f"{t} steps")
figure.savefig(arguments.out, dpi=80)
print(f"the picture is in {arguments.out}")
