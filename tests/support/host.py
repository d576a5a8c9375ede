"""What the host takes for a launch: `python tests/support/host.py`, on a CUDA device without kernels.

CPU time of this process, of ways that take turns, and what it is over torch.add's in the same round: the ratio holds
whatever the machine's speed does meanwhile.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch

import fake_device
from fastanila import AdjustedAniLA, AniLA, ops
from fastanila.models import MLP, GaussianMixture

_ROUNDS, _CALLS, _WARM_UP = 60, 40, 30


def ways() -> dict[str, Callable[[], object]]:
    z, score = torch.zeros(32, 2).cuda(), torch.zeros(32, 2).cuda()
    step = functools.partial(ops.anisotropic_step, z, score)
    threshold, eps, seed, t = (torch.tensor(x).cuda() for x in (1.0, 0.01, 1, 2))
    found = {
        "torch.add": functools.partial(torch.add, z, score),
        "anisotropic_step, numbers": functools.partial(step, 1.0, step_size=0.01, seed=1, step=2),
        "anisotropic_step, tensors": functools.partial(step, threshold, step_size=eps, seed=seed, step=t),
    }
    chains = torch.zeros(1024, 2).cuda()
    for name, energy in (
        ("mixture", GaussianMixture(torch.eye(2))),
        ("mlp", MLP(2, 64)),
        ("mlp on features", MLP(2, 64, features=64, confinement=0.5)),
    ):
        for sampler in (AniLA(10.0, 0.005), AdjustedAniLA(10.0, 0.02)):
            run = functools.partial(sampler.run, energy.cuda(), chains, steps=100, seed=1)
            found[f"{type(sampler).__name__}.run, {name}"] = run
    return found


def measured() -> list[str]:
    found = ways()
    for way in found.values():
        for _ in range(_WARM_UP):
            way()
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(_ROUNDS):
        for name, way in found.items():
            began = time.thread_time()
            for _ in range(_CALLS):
                way()
            times[name].append((time.thread_time() - began) / _CALLS * 1e6)
    lines = []
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times["torch.add"], strict=True))
        lines.append(f"{name}: {statistics.median(own):.0f} us, {ratio:.1f} times torch.add")
    return lines


CASES = {"host": measured}

if __name__ == "__main__":
    if fake_device.is_case(sys.argv[1:]):
        fake_device.main(CASES, sys.argv[1:])
    elif reason := fake_device.unavailable():
        sys.exit(reason)
    else:
        made = fake_device.run(__file__, ["host"])["host"]
        sys.exit(made["error"]) if "error" in made else print("\n".join(made["result"]))
