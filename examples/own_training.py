"""Your own energy network and data in the trainer. The same from the command line, in this folder:

python -m fastanila.train --energy own_training:network --data own_training:spiral
"""

import argparse
import math
import shutil

import torch
from torch import nn

from fastanila.training.loop import train
from fastanila.training.settings import Settings


class Energy(nn.Module):
    """(B, 2) -> (B,), float32. The square keeps the density normalisable."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x).squeeze(-1) + 0.25 * x.square().sum(-1)


def network():
    return Energy()


def spiral(count=5000):
    """(N, 2): points about a spiral."""
    generator = torch.Generator().manual_seed(0)
    t = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
    points = torch.stack((t * t.cos(), t * t.sin()), 1) / 3
    return points + 0.1 * torch.randn(count, 2, generator=generator)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--run", help="run directory; default a new one in runs/")
    parser.add_argument("--out", default="own_training.png", help="picture to write")
    arguments = parser.parse_args()

    settings = Settings(iterations=arguments.iterations, lr=2e-3, fused=arguments.fused, out=arguments.run)
    best: list[float] = []  # a callback sees every row of metrics.jsonl
    run = train(settings, energy=network(), data=spiral(), on_log=lambda row: best.append(row.get("nll", math.inf)))
    print(f"least nll {min(best):.3f}; {run.iteration} updates; sampler {run.sampler}")
    shutil.copy(f"{run.settings.out}/figure.png", arguments.out)
    print(f"the picture is in {arguments.out}")
