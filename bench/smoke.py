"""The first minutes on a GPU: are the numbers right, does everything capture, and how long do the main works take?

`python -m bench.smoke PART ... [--untimed]` prints one JSON object a line for every finding, on stderr tracebacks and
profiles. Every check stands alone: one that breaks is a finding too, and the next goes on. Its exit code is 1 if a
finding is not ok. `bench.gpu` runs every part in a process of its own: first all of them side by side, untimed, which
checks, compiles and captures everything, and fills the caches; then the timed ones by themselves.

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

from fastanila import AdjustedAniLA, AniLA, noise, ops
from fastanila.graphs import cuda_graph
from fastanila.models import MLP, ConvNet, GaussianMixture
from fastanila.ops import reference
from fastanila.samplers import chain
from fastanila.samplers.sampler import Sampler
from fastanila.training import job as job_training
from fastanila.training import loop, update
from fastanila.training.settings import Settings

from . import workloads
from .chain_rows import IMAGES
from .timing import fallbacks_are_errors, measure
from .workloads import Way

Finding = dict[str, object]


class Run(NamedTuple):
    """How the checks are to be made."""

    device: torch.device
    timed: bool = True  #: False: every work is done once, and no time taken

    def times(self, ways: dict[str, Way], rounds: int = 5) -> dict[str, Finding]:
        """Microseconds a call, by way: of the device, and of the host until the call returns."""
        if not self.timed:
            for way in ways.values():
                way()
            torch.cuda.synchronize(self.device)
            return {name: {} for name in ways}
        for way in ways.values():
            way()
        device = measure(ways, self.device, rounds=rounds, queued=True)
        host = measure(ways, self.device, rounds=rounds, host=True)
        return {name: dict(device_us=1e6 * device[name].median, host_us=1e6 * host[name].median) for name in ways}

    def profile(self, name: str, way: Way) -> None:
        """The kernels of one call, on stderr."""
        if not self.timed:
            return
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as seen:
            way()
            torch.cuda.synchronize(self.device)
        table = seen.key_averages().table(sort_by="cuda_time_total", row_limit=22, max_name_column_width=70)
        sys.stderr.write(f"--- {name}\n{table}\n")


Check = Callable[[Run], Iterator[Finding]]


def agreement(got: Tensor, want: Tensor, tolerance: float, share: float) -> Finding:
    """ok: all finite, and at most that share of the elements is further from what is wanted than the tolerance."""
    error = (got.double().cpu() - want.double().cpu()).abs() / want.double().cpu().abs().clamp(min=1)
    beyond = (~(error <= tolerance)).double().mean().item()
    ok = bool(torch.isfinite(got).all()) and beyond <= share
    return dict(ok=ok, worst=error.max().item(), beyond=beyond, tolerance=tolerance)


# ----------------------------------------------------------------------------------------------------- right numbers

_ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def step_numbers(run: Run) -> Iterator[Finding]:
    """The fused step against its definition in float64."""
    generator = torch.Generator().manual_seed(0)
    for dtype, norm in itertools.product(_ROUNDING, reference.NORMS):
        z, score = (torch.randn(64, 3, 32, 32, generator=generator).to(dtype) for _ in range(2))
        threshold = 60.0 if norm == "chain" else 1.0
        named = dict(seed=(1 << 63) + 5, step=(1 << 33) + 7, offset=3)
        made, seen = ops.anisotropic_step(
            z.to(run.device), score.to(run.device), threshold, step_size=0.3, norm=norm, statistics=True, **named
        )
        xi = noise.normal(z.shape, **named, dtype=torch.float64)
        want = reference.anisotropic_step(z.double(), score.double(), threshold, step_size=0.3, norm=norm, noise=xi)
        found = agreement(made, want, _ROUNDING[dtype], 1e-4)
        yield dict(check="step", dtype=str(dtype), norm=norm, **found, gamma=seen.gamma_mean.mean().item())


def networks(device: torch.device) -> Iterator[tuple[nn.Module, Tensor]]:
    """Energies that whole-chain kernels take, with chains."""
    generator = torch.Generator().manual_seed(0)
    for energy, dim in (
        (GaussianMixture(torch.eye(2)), 2),
        (MLP(2, 64), 2),
        (MLP(2, 64, features=64, confinement=0.1), 2),
        (MLP(8, 128, 3), 8),
    ):
        yield energy.to(device), torch.randn(1000, dim, generator=generator).to(device)


def whole_chain_numbers(run: Run) -> Iterator[Finding]:
    """Runs on the fastest way against the plain definition: unadjusted and exact."""
    for energy, z in networks(run.device):
        for sampler, share in ((AniLA(1.5, 0.05), 1e-3), (AdjustedAniLA(1.5, 0.05), 2e-2)):
            got, want = (sampler.run(energy, z, steps=10, seed=1, compile=compile) for compile in (True, False))
            found = agreement(got, want, 1e-3, share)
            yield dict(check="whole chain", **_told(sampler, energy, z), **found)


def metropolis_numbers(run: Run) -> Iterator[Finding]:
    """Captured transitions of the exact sampler against the plain definition, in every norm."""
    generator = torch.Generator().manual_seed(0)
    for shape, norm in (((512, 128), "element"), ((64, 3, 32, 32), "chain"), ((64, 3, 32, 32), "channel")):
        energy = (MLP(128, 64) if len(shape) == 2 else ConvNet(3, 32, 8)).to(run.device)
        z, sampler = torch.randn(shape, generator=generator).to(run.device), AdjustedAniLA(50.0, 0.01, norm=norm)
        got, want = (sampler.run(energy, z, steps=5, seed=1, compile=compile) for compile in (True, False))
        yield dict(check="adjusted", norm=norm, **_told(sampler, energy, z), **agreement(got, want, 1e-3, 5e-2))


def _told(sampler: Sampler, energy, z: Tensor) -> Finding:
    path = chain.path(sampler, energy, z, fused=True)
    return dict(sampler=type(sampler).__name__, energy=type(energy).__name__, shape=list(z.shape), path=path)


# ------------------------------------------------------------------------------------------------------------ captures


def captured_chains(run: Run) -> Iterator[Finding]:
    """Replays against the plain definition; and whether two of them have the same bits, as cuDNN's may not."""
    generator = torch.Generator().manual_seed(0)
    for energy, shape in ((MLP(128, 64), (1024, 128)), (ConvNet(3, 32, 32), (64, 3, 32, 32))):
        energy, z = energy.to(run.device), torch.randn(shape, generator=generator).to(run.device)
        for sampler in (AniLA(1.0, 0.01), AniLA(1.0, 0.01, refresh="update"), AdjustedAniLA(50.0, 0.001)):
            once, again, plain = (sampler.run(energy, z, steps=21, seed=1, compile=c) for c in (True, True, False))
            found = agreement(once, plain, 1e-3, 5e-2 if sampler.is_exact else 1e-2)
            yield dict(check="captured", **_told(sampler, energy, z), repeats=torch.equal(once, again), **found)


def failed_capture(run: Run) -> Iterator[Finding]:
    """One that fails leaves torch whole: its generator, its memory and the next capture."""
    x = torch.ones(8, device=run.device)
    torch.randn(2, device=run.device)
    try:
        cuda_graph(lambda: x.sum().item(), run.device)
        refused = None
    except RuntimeError as error:
        refused = str(error).splitlines()[0]
    torch.randn(2, device=run.device)
    before = torch.cuda.memory_reserved(run.device)
    large = torch.empty(1 << 28, device=run.device)
    del large
    torch.cuda.empty_cache()
    replay = cuda_graph(lambda: x * 2, run.device)
    twice = replay().tolist()
    kept = torch.cuda.memory_reserved(run.device) - before
    ok = refused is not None and twice == [2.0] * 8 and kept < 1 << 28
    yield dict(check="a capture that fails", ok=ok, error=refused, kept_MB=kept >> 20)


# --------------------------------------------------------------------------------------------------------------- times

#: Sizes of the step's launch that may be chosen: elements and warps of a program.
STEP_SIZES = ((2048, 4), (1024, 4), (2048, 8), (512, 2))
#: Of the whole-chain kernel of an MLP: chains and warps of a program; None is what it chooses by itself.
MLP_SIZES = (None, (8, 4), (8, 8), (4, 4), (4, 8), (16, 8))


def step_times(run: Run) -> Iterator[Finding]:
    """Every size of launch beside a copy of the same bytes."""
    from fastanila.kernels import step

    chosen = step.CONFIGURATION
    for exponent, dtype in itertools.product((24, 26), workloads.DTYPES):
        arguments = workloads.step_arguments(1 << exponent, dtype, run.device)

        def of(block: int, warps: int, arguments=arguments) -> Way:
            def way():
                step.CONFIGURATION = step.Configuration(block, warps)
                return workloads.anisotropic_step(**arguments)

            return way

        ways = {"copy": workloads.device_copy(1 << exponent, dtype, run.device)}
        ways |= {f"{block} elements, {warps} warps": of(block, warps) for block, warps in STEP_SIZES}
        try:
            found = run.times(ways)
        finally:
            step.CONFIGURATION = chosen
        for name, times in found.items():
            shares = {"of_copy": found["copy"]["device_us"] / times["device_us"]} if times else {}
            yield dict(check="step", way=name, elements=1 << exponent, dtype=dtype, **times, **shares)


def whole_chain_times(run: Run) -> Iterator[Finding]:
    """The MLP's kernel in every size of launch, and the run that a user calls: unadjusted and exact."""
    generator = torch.Generator().manual_seed(0)
    for features, chains in ((0, 1024), (64, 512), (0, 16384)):
        energy = MLP(2, 64, features=features, confinement=0.1).to(run.device)
        z = torch.randn(chains, 2, generator=generator).to(run.device)
        for sampler in (AniLA(10.0, 0.005), AdjustedAniLA(10.0, 0.005)):
            told = dict(check="100 transitions", features=features, **_told(sampler, energy, z))
            sizes = MLP_SIZES if chain.makes_whole_chains(sampler, energy, z) else (None,)
            for size in sizes:
                try:
                    with mlp_size(size):
                        found = run.times({"run": lambda s=sampler, e=energy, x=z: s.run(e, x, steps=100, seed=1)})
                except Exception as error:  # a size may be more than registers or shared memory hold
                    yield dict(**told, size=size, refused=f"{type(error).__name__}: {error}"[:160])
                    continue
                yield dict(**told, size=size, **found["run"])


@contextlib.contextmanager
def mlp_size(size: tuple[int, int] | None) -> Iterator[None]:
    """The MLP's whole-chain kernels with so many chains and warps a program."""
    from fastanila.kernels import mlp

    chosen = mlp.mlp_constants

    def constants(*arguments, **named):
        found = chosen(*arguments, **named)
        return found if size is None or found is None else ({**found[0], "ROWS": size[0]}, size[1], *found[2:])

    mlp.mlp_constants = constants
    try:
        yield
    finally:
        mlp.mlp_constants = chosen


def mixture_times(run: Run) -> Iterator[Finding]:
    energy = workloads.Chains("mixture", (10_000, 2), 100)
    for name, way in (("AniLA", energy.ours("AniLA", run.device)), ("AdjustedAniLA", energy.exact(run.device))):
        yield dict(check=energy.title, sampler=name, **run.times({"run": way})["run"])


def convnet_times(run: Run) -> Iterator[Finding]:
    for precision, chains in reversed(IMAGES.items()):
        way = chains.ours("AniLA", run.device)
        yield dict(check=chains.title, **run.times({"run": way}, rounds=3)["run"])
        if precision != "tf32":
            run.profile(chains.title, way)


def update_times(run: Run) -> Iterator[Finding]:
    """Updates, captured: of the default job, of that with the unadjusted sampler, and of images."""
    for name, settings in (
        ("rings, the default", workloads.rings_settings(run.device, sampler=None)),
        ("rings, anila", workloads.rings_settings(run.device)),
        ("images, bf16", workloads.image_settings(run.device, precision="bf16")),
    ):
        with settings as chosen:
            job, way = workloads.our_update(chosen)
            made = job.made.item()
            path = job_training.describe(job)
            found = run.times({"update": way}, rounds=3)["update"]
            ok = made == update._WARM_UP + 2 and job.made.item() > made and not job.broken.item()
            yield dict(check="one update", job=name, ok=ok, path=path, **found)
            run.profile(f"one update, {name}", way)


def trains(run: Run) -> Iterator[Finding]:
    """The default job, shortened: it learns the rings."""
    from fastanila import evaluate

    iterations = 1000 if run.timed else 8
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(iterations=iterations, sample_every=0, out=f"{folder}/run", device=str(run.device))
        began = time.perf_counter()
        trained = loop.train(settings, say=lambda text: None)
        seconds = time.perf_counter() - began
        if not run.timed:
            yield dict(check="training", ok=True, updates=iterations)
            return
        found = evaluate.evaluate(trained)
        ok = math.isfinite(found["gap"]) and found["tv"] < 0.5
        yield dict(check="training", ok=ok, updates=iterations, seconds=seconds, gap=found["gap"], tv=found["tv"])


# ----------------------------------------------------------------------------------------------------------- the parts

#: The checks of each part, whose names its command line takes.
PARTS: dict[str, tuple[Check, ...]] = {
    "numbers": (step_numbers, whole_chain_numbers, metropolis_numbers),
    "capture": (captured_chains, failed_capture),
    "step": (step_times,),
    "chains": (whole_chain_times, mixture_times),
    "update": (update_times,),
    "conv": (convnet_times,),
    "train": (trains,),
}
#: Those that take times, by what they are worth.
TIMED = ("step", "chains", "update", "conv", "train")


def findings(part: str, check: Check, run: Run) -> Iterator[Finding]:
    """A check's findings, each with its part, and how long it took; or how it failed, with a traceback on stderr."""
    began = time.perf_counter()
    found: Finding = {}
    try:
        with fallbacks_are_errors():
            for one in check(run):
                yield dict(part=part, **one)
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
    except Exception as error:
        sys.stderr.write(f"--- {part}: {check.__name__}\n{traceback.format_exc()}\n")
        sys.stderr.flush()
        found = dict(ok=False, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    yield dict(part=part, check=check.__name__, **found, seconds=time.perf_counter() - began)


def shown(finding: Finding) -> str:
    """One line of JSON, numbers to four digits."""
    short = {k: float(f"{v:.4g}") if isinstance(v, float) and math.isfinite(v) else v for k, v in finding.items()}
    return json.dumps({k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in short.items()})


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    made.add_argument("--untimed", action="store_true", help="do everything once, and take no time")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    arguments = made.parse_args(argv)
    run = Run(torch.device(arguments.device), timed=not arguments.untimed)
    good = True
    for part in arguments.parts:
        for check in PARTS[part]:
            for finding in findings(part, check, run):
                good &= finding.get("ok") is not False
                print(shown(finding), flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
