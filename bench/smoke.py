"""The first minutes on a GPU: are the numbers right, does everything capture, does it learn?

`python -m bench.smoke PART ...` prints one JSON object a line for every finding, and tracebacks on stderr. Every check
stands alone: one that breaks is a finding too, and the next goes on. Its exit code is 1 if a finding is not ok.
`bench.gpu` runs every part in a process of its own, side by side, which fills the compilers' caches for the table.

Agreement is judged by the share of elements whose error, relative where they are above 1, is beyond a tolerance: fast
logarithms lose digits near u = 1, and a Metropolis decision may fall the other way by rounding, both seldom.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastanila import AdjustedAniLA, AniLA, evaluate, noise, ops, reference, training, transitions
from fastanila.base import Sampler
from fastanila.capture import cuda_graph
from fastanila.config import Settings
from fastanila.energies import MLP, ConvNet, GaussianMixture

from . import rows
from .row import OURS
from .timing import fallbacks_are_errors

Finding = dict[str, object]
Check = Callable[[torch.device], Iterator[Finding]]


def agreement(got: Tensor, want: Tensor, tolerance: float, share: float) -> Finding:
    """ok: all finite, and at most that share of the elements is further from what is wanted than the tolerance."""
    error = (got.double().cpu() - want.double().cpu()).abs() / want.double().cpu().abs().clamp(min=1)
    beyond = (~(error <= tolerance)).double().mean().item()
    ok = bool(torch.isfinite(got).all()) and beyond <= share
    return dict(ok=ok, worst=error.max().item(), beyond=beyond, tolerance=tolerance)


# ----------------------------------------------------------------------------------------------------- right numbers

_ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def step_numbers(device: torch.device) -> Iterator[Finding]:
    """The fused step against its definition in float64."""
    generator = torch.Generator().manual_seed(0)
    for dtype, norm in itertools.product(_ROUNDING, reference.NORMS):
        z, score = (torch.randn(64, 3, 32, 32, generator=generator).to(dtype) for _ in range(2))
        threshold = 60.0 if norm == "chain" else 1.0
        named = dict(seed=(1 << 63) + 5, step=(1 << 33) + 7, offset=3)
        made, seen = ops.anisotropic_step(
            z.to(device), score.to(device), threshold, step_size=0.3, norm=norm, statistics=True, **named
        )
        xi = noise.normal(z.shape, **named, dtype=torch.float64)
        want = reference.anisotropic_step(z.double(), score.double(), threshold, step_size=0.3, norm=norm, noise=xi)
        found = agreement(made, want, _ROUNDING[dtype], 1e-4)
        yield dict(check="step", dtype=str(dtype), norm=norm, **found, gamma=seen.gamma_mean.mean().item())


class Case(NamedTuple):
    """Chains of a sampler, on the fastest way there is."""

    energy: nn.Module
    shape: tuple[int, ...]
    sampler: Sampler
    share: float  #: of elements that may be off
    steps: int


def agree(device: torch.device, cases: Sequence[Case]) -> Iterator[Finding]:
    """The chains against the plain definition; and whether two of them have the same bits, as cuDNN's may not."""
    generator = torch.Generator().manual_seed(0)
    for energy, shape, sampler, share, steps in cases:
        energy, z = energy.to(device), torch.randn(shape, generator=generator).to(device)
        once, again, plain = (sampler.run(energy, z, steps=steps, seed=1, compile=c) for c in (True, True, False))
        found = agreement(once, plain, 1e-3, share)
        yield dict(check="chains", **told(sampler, energy, z), repeats=torch.equal(once, again), **found)


def told(sampler: Sampler, energy: nn.Module, z: Tensor) -> Finding:
    path = transitions.path(sampler, energy, z, fused=True)
    norm = getattr(sampler, "norm", None)
    return dict(sampler=type(sampler).__name__, norm=norm, energy=type(energy).__name__, shape=list(z.shape), path=path)


def whole_chain_numbers(device: torch.device) -> Iterator[Finding]:
    """Those that one kernel makes."""
    energies = (
        (GaussianMixture(torch.eye(2)), 2),
        (MLP(2, 64), 2),
        (MLP(2, 64, features=64, confinement=0.1), 2),
        (MLP(8, 128, 3), 8),
    )
    samplers = ((AniLA(1.5, 0.05), 1e-3), (AdjustedAniLA(1.5, 0.05), 2e-2))
    return agree(device, [Case(energy, (1000, dim), *sampler, 10) for energy, dim in energies for sampler in samplers])


def metropolis_numbers(device: torch.device) -> Iterator[Finding]:
    """Captured transitions of the exact sampler, in every norm."""
    images = (64, 3, 32, 32)
    works = (("element", MLP(128, 64), (512, 128)), ("chain", ConvNet(3, 32, 8), images))
    works += (("channel", ConvNet(3, 32, 8), images),)
    return agree(device, [Case(e, shape, AdjustedAniLA(50.0, 0.01, norm=norm), 5e-2, 5) for norm, e, shape in works])


def captured_chains(device: torch.device) -> Iterator[Finding]:
    """Replays of captured transitions, an odd number of them."""
    works = ((MLP(128, 64), (1024, 128)), (ConvNet(3, 32, 32), (64, 3, 32, 32)))
    samplers = ((AniLA(1.0, 0.01), 1e-2), (AniLA(1.0, 0.01, refresh="update"), 1e-2), (AdjustedAniLA(50.0, 1e-3), 5e-2))
    return agree(device, [Case(*work, *sampler, 21) for work in works for sampler in samplers])


# ------------------------------------------------------------------------------------------------------------ captures


def failed_capture(device: torch.device) -> Iterator[Finding]:
    """One that fails leaves torch whole: its generator, its memory and the next capture."""
    x = torch.ones(8, device=device)
    torch.randn(2, device=device)
    try:
        cuda_graph(lambda: x.sum().item(), device)
        refused = None
    except RuntimeError as error:
        refused = str(error).splitlines()[0]
    torch.randn(2, device=device)
    before = torch.cuda.memory_reserved(device)
    large = torch.empty(1 << 28, device=device)
    del large
    torch.cuda.empty_cache()
    replay = cuda_graph(lambda: x * 2, device)
    twice = replay().tolist()
    kept = torch.cuda.memory_reserved(device) - before
    ok = refused is not None and twice == [2.0] * 8 and kept < 1 << 28
    yield dict(check="a capture that fails", ok=ok, error=refused, kept_MB=kept >> 20)


def works(group: str) -> Check:
    """Our ways of the table's works: each runs twice, by the path that its row is named for."""

    def check(device: torch.device) -> Iterator[Finding]:
        for row in rows.rows(device.type):
            if row.group == group:
                with contextlib.ExitStack() as closing:
                    way = row.build(device, closing)[OURS]()
                    way(), way()
                yield dict(check=row.work, ok=True)

    check.__name__ = group
    return check


def trains(device: torch.device) -> Iterator[Finding]:
    """The default job, shortened: it learns the rings."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(iterations=1000, sample_every=0, out=f"{folder}/run", device=str(device))
        found = evaluate.evaluate(training.train(settings, say=lambda text: None))
    ok = math.isfinite(found["gap"]) and found["tv"] < 0.5
    yield dict(check="training", ok=ok, updates=settings.iterations, gap=found["gap"], tv=found["tv"])


# ----------------------------------------------------------------------------------------------------------- the parts

#: The checks of each part, whose names its command line takes.
PARTS: dict[str, tuple[Check, ...]] = {
    "numbers": (step_numbers, whole_chain_numbers, metropolis_numbers),
    "capture": (captured_chains, failed_capture),
    **{group: (works(group),) for group in ("chains", "convnet", "update")},
    "train": (trains,),
}


def findings(part: str, check: Check, device: torch.device) -> Iterator[Finding]:
    """A check's findings, each with its part, and how long it took; or how it failed, with a traceback on stderr."""
    began = time.perf_counter()
    found: Finding = {}
    try:
        with fallbacks_are_errors():
            for one in check(device):
                yield dict(part=part, **one)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except Exception as error:
        print(f"--- {part}: {check.__name__}", traceback.format_exc(), sep="\n", file=sys.stderr, flush=True)
        found = dict(ok=False, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    yield dict(part=part, check=check.__name__, **found, seconds=time.perf_counter() - began)


def shown(finding: Finding) -> str:
    """One line of JSON, numbers to four digits."""

    def short(value: object) -> object:
        if not isinstance(value, float):
            return value
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)

    return json.dumps({name: short(value) for name, value in finding.items()})


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    arguments = made.parse_args(argv)
    device, good = torch.device(arguments.device), True
    for part in arguments.parts:
        for check in PARTS[part]:
            for finding in findings(part, check, device):
                good &= finding.get("ok") is not False
                print(shown(finding), flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
