"""The rows of the table: which works, which ways of each, and the goals that are set for them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch

from fastanila import updates
from fastanila.capture import compiled

from . import rival_updates, rivals, workloads
from .rivals import NotInstalled
from .workloads import Chains, Way

GROUPS = ("step", "noise", "chains", "convnet", "update", "host", "startup")
OURS = "fastanila"

Builders = dict[str, Callable[[], Way]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One work and the ways to do it."""

    group: str  #: of GROUPS
    work: str
    shape: tuple[int, ...]
    dtype: str
    #: (device, what is closed after the row) -> the ways by name; each is built when it is its turn
    build: Callable[[torch.device, contextlib.ExitStack], Builders]
    at_least: dict[str, float] = dataclasses.field(default_factory=dict)  #: a way's time over ours
    at_most: dict[str, float] = dataclasses.field(default_factory=dict)  #: a way's time in seconds
    bytes_moved: int | None = None  #: by every way that moves z, score and z'
    host: bool = False  #: the host's time is meant
    once: bool = False  #: slow ways, each timed three times


def rows(device_type: str, quick: bool = False) -> list[Row]:
    """The table's rows on "cuda" or "cpu". ``quick``: small ones without rival compilers, for testing the table."""
    found = [
        *step_rows(device_type, quick),
        *noise_rows(device_type, quick),
        *chain_rows(device_type, quick),
        *update_rows(device_type, quick),
        host_row(device_type),
        startup_row(device_type, quick),
    ]
    if quick:  # at such sizes a goal says nothing
        found = [dataclasses.replace(row, at_least={}, at_most={}) for row in found]
    return sorted(found, key=lambda row: GROUPS.index(row.group))


# ------------------------------------------------------------------------------------------------- step and noise


def step_rows(device_type: str, quick: bool) -> list[Row]:
    exponents = (12, 16, 20, 22, 24, 26, 28) if device_type == "cuda" else (12, 16, 20, 24)
    if quick:
        return [step_row(device_type, 1 << 12, "float32", quick)]
    return [step_row(device_type, 1 << e, dtype, quick) for dtype in workloads.DTYPES for e in exponents]


def step_row(device_type: str, elements: int, dtype: str, quick: bool) -> Row:
    cuda = device_type == "cuda"

    def build(device, closing) -> Builders:
        @functools.cache
        def arguments() -> dict:
            return workloads.step_arguments(elements, dtype, device)

        def by_hand(function) -> Way:
            return functools.partial(function, arguments()["z"], arguments()["score"])

        step = workloads.anisotropic_step
        ways: Builders = {
            OURS: lambda: functools.partial(step if cuda else compiled(step), **arguments()),
            "copy of the same bytes": lambda: workloads.device_copy(elements, dtype, device),
            "eager": lambda: by_hand(rivals.eager_step),
        }
        if not cuda and elements <= 1 << 20:  # on CUDA the operator as it stands is the first way
            ways["fastanila, not compiled"] = lambda: functools.partial(step, **arguments())
        if not quick:
            ways["torch.compile"] = lambda: by_hand(rivals.fresh_compile(rivals.plain_step))
        if cuda and elements == 1 << 26:
            ways["torch.compile, rand4x"] = lambda: by_hand(rivals.fresh_compile(rivals.plain_step, rand4x=True))
        return ways

    if cuda and elements >= 1 << 24:
        goals = {
            "copy of the same bytes": 0.92,
            "torch.compile": {"float32": 1.4, "bfloat16": 2.5}[dtype],
            "eager": 6.0,
        }
    else:
        goals = {"eager": 1.0} if cuda else {"eager": 4.0, "torch.compile": 2.0}
    exponent = elements.bit_length() - 1
    return Row(
        "step", f"step, 2^{exponent}, {dtype}", (elements,), dtype, build, goals,
        bytes_moved=workloads.step_bytes(elements, dtype),
    )  # fmt: skip


def noise_rows(device_type: str, quick: bool) -> list[Row]:
    def row(exponent: int) -> Row:
        def build(device, closing) -> Builders:
            def of(function, *names: str) -> Way:
                arguments = workloads.step_arguments(1 << exponent, "float32", device)
                return functools.partial(function, *(arguments[name] for name in names))

            return {
                OURS: lambda: of(compiled(workloads.normals), "z", "seed", "step"),
                "torch.randn": lambda: of(torch.randn_like, "z"),
            }

        goals = {} if device_type == "cuda" else {"torch.randn": 3.0}
        return Row("noise", f"normals, 2^{exponent}", (1 << exponent,), "float32", build, goals)

    return [row(exponent) for exponent in ((12,) if quick else (16, 20, 24))]


# --------------------------------------------------------------------------------------------------------- chains

MIXTURE = Chains("mixture", (10_000, 2), 100)
MLP_SHAPES = (((64, 8), 50), ((1024, 2), 100), ((16384, 2), 100), ((1024, 128), 200))
IMAGES = (64, 3, 32, 32)


def chain_rows(device_type: str, quick: bool) -> list[Row]:
    if quick:
        return [chain_row(device_type, Chains("mixture", (64, 2), 5), quick)]
    if device_type == "cpu":
        works = [MIXTURE, Chains("mlp-64", (1024, 2), 100), Chains("convnet-32", IMAGES, 10)]
    else:
        works = [
            MIXTURE,
            *[Chains(network, shape, steps) for network in ("mlp-64", "mlp-128") for shape, steps in MLP_SHAPES],
            *[Chains("convnet-32", IMAGES, 100, precision) for precision in ("float32", "tf32", "bf16")],
        ]
    return [chain_row(device_type, work, quick) for work in works]


def chain_row(device_type: str, chains: Chains, quick: bool) -> Row:
    def build(device, closing) -> Builders:
        return chain_ways(chains, device, quick)

    goals = cuda_chain_goals(chains) if device_type == "cuda" else cpu_chain_goals(chains)
    group = "convnet" if chains.is_image else "chains"
    return Row(group, chains.title, chains.shape, chains.precision, build, goals)


def chain_ways(chains: Chains, device: torch.device, quick: bool) -> Builders:
    cuda = device.type == "cuda"

    @functools.cache
    def step(kind: str, **options):
        return rivals.compiled_step(chains, kind, device, **options)

    ways: Builders = {
        OURS: lambda: chains.ours("AniLA", device),
        "fastanila, Langevin": lambda: chains.ours("Langevin", device),
        "torchebm": lambda: rivals.torchebm_langevin(chains, device),
        "ebmkit": lambda: rivals.ebmkit_langevin(chains, device),
        "eager loop": lambda: rivals.eager_loop(chains, "AniLA", device),
        "eager loop, Langevin": lambda: rivals.eager_loop(chains, "Langevin", device),
        "the authors' form": lambda: rivals.authors_loop(chains, device),
    }
    if chains.is_image:
        ways["eager loop, channels_last"] = lambda: rivals.eager_loop(chains, "AniLA", device, channels_last=True)
        ways["its convolutions alone"] = lambda: rivals.convolutions_alone(chains, device)
    if chains.precision == "bf16":
        float32 = dataclasses.replace(chains, precision="float32")
        ways["eager loop in float32"] = lambda: rivals.eager_loop(float32, "AniLA", device)
    if quick:
        return ways
    ways["torch.compile"] = lambda: rivals.compiled_loop(chains, step("AniLA"), device)
    if not cuda:
        return ways
    ways["torch.compile, captured by hand"] = lambda: rivals.captured_loop(chains, step("AniLA"), device)
    if chains.network != "mlp-128":  # compiling takes its time, and width makes no difference to launches
        ways["torch.compile, reduce-overhead"] = lambda: rivals.reduce_overhead_loop(
            chains, step("AniLA", cudagraphs=True), device
        )
    if chains == Chains("mlp-64", (1024, 2), 100):
        ways["torch.compile, rand4x"] = lambda: rivals.compiled_loop(chains, step("AniLA", rand4x=True), device)
        ways["torch.compile, reduce-overhead, rand4x"] = lambda: rivals.reduce_overhead_loop(
            chains, step("AniLA", cudagraphs=True, rand4x=True), device
        )
    return ways


def cuda_chain_goals(chains: Chains) -> dict[str, float]:
    goals = {"fastanila, Langevin": 1 / 1.01, "eager loop": 1.0}
    if chains.is_image:
        return (
            goals
            | {
                "float32": {"its convolutions alone": 1 / 1.1},
                "tf32": {"eager loop": 2.5, "eager loop, channels_last": 2.5},
                "bf16": {"eager loop": 3.0, "eager loop, channels_last": 3.0, "eager loop in float32": 5.0},
            }[chains.precision]
        )
    compiled_loops = ["torch.compile"]
    if chains.network != "mlp-128":
        compiled_loops.append("torch.compile, reduce-overhead")
    loops = ("torchebm", "eager loop", "eager loop, Langevin")
    if chains.network != "mixture":
        goals |= dict.fromkeys(loops, 20.0) | dict.fromkeys(compiled_loops, 3.0)
    if chains.shape[1] <= 8:  # one kernel makes the whole chain
        goals |= dict.fromkeys((*compiled_loops, "torch.compile, captured by hand"), 10.0)
        if chains.shape in ((64, 8), (1024, 2)):
            goals |= dict.fromkeys(loops, 100.0)
    return goals


def cpu_chain_goals(chains: Chains) -> dict[str, float]:
    if chains.network == "mixture":
        return dict.fromkeys(("torchebm", "ebmkit", "eager loop", "eager loop, Langevin"), 3.0)
    loops = ["torchebm", "eager loop", "eager loop, Langevin"]
    return dict.fromkeys([*loops, "eager loop, channels_last"], 1.3) if chains.is_image else dict.fromkeys(loops, 1.0)


# -------------------------------------------------------------------------------------------------------- updates


def update_rows(device_type: str, quick: bool) -> list[Row]:
    steps = 2 if quick else 60
    cuda = device_type == "cuda"
    rings = update_row(f"one update, rings, K={steps}", (512, 2), "float32", workloads.rings_settings, steps)
    rings = dataclasses.replace(rings, at_least={"the authors' form": 40.0 if cuda else 1.0, "eager": 1.0})
    if quick or not cuda:
        return [rings]
    images = [
        update_row(
            f"one update, 64 x 3x32x32, K={steps}, {precision}", (64, 3, 32, 32), precision,
            functools.partial(workloads.image_settings, precision=precision), steps,
        )
        for precision in ("float32", "bf16")
    ]  # fmt: skip
    return [rings, *[dataclasses.replace(row, at_least={"eager": 1.0}) for row in images]]


def update_row(work: str, shape: tuple[int, ...], dtype: str, settings_of, steps: int) -> Row:
    def build(device, closing) -> Builders:
        @functools.cache
        def prepared() -> tuple[updates.Job, Way]:
            return workloads.our_update(closing.enter_context(settings_of(device, steps=steps)))

        def of(form) -> Way:
            job, _ = prepared()
            energy = workloads.Ordinary(job.energy, dtype).to(device)
            pool = job.data.draw(4096, seed=0, step=0, device=device)
            update = form(energy, pool, job.settings.batch_size, job.settings.chains, job.settings)
            return workloads.in_precision(update, dtype)

        return {
            OURS: lambda: prepared()[1],
            "eager": lambda: of(rival_updates.eager_update),
            "the authors' form": lambda: of(rival_updates.authors_update),
        }

    return Row("update", work, shape, dtype, build)


# ---------------------------------------------------------------------------------------------- host and start-up


def host_row(device_type: str) -> Row:
    def build(device, closing) -> Builders:
        @functools.cache
        def arguments() -> dict:
            return workloads.step_arguments(64, "float32", device)

        def of(function, *names: str) -> Way:
            return functools.partial(function, *(arguments()[name] for name in names))

        step = workloads.anisotropic_step
        return {
            OURS: lambda: functools.partial(step, **arguments()),
            "fastanila, compiled": lambda: functools.partial(compiled(step), **arguments()),
            "eager step": lambda: of(rivals.eager_step, "z", "score"),
            "torch.add": lambda: of(torch.add, "z", "score"),
        }

    return Row("host", "host time of one eager call, 64 elements", (64,), "float32", build, host=True)


_FIRST_STEP = """
import torch
from fastanila import ops
from fastanila.capture import compiled
def step(z, score, threshold, seed, t):
    return ops.anisotropic_step(z, score, threshold, seed=seed, step=t)
z = torch.zeros(512, 2, device={device!r})
one, word = torch.ones((), device=z.device), torch.ones((), dtype=torch.int64, device=z.device)
compiled(step)(z, z, one, word, word)
"""


def startup_row(device_type: str, quick: bool) -> Row:
    def build(device, closing) -> Builders:
        warm = closing.enter_context(tempfile.TemporaryDirectory())

        def python(*arguments: str, cache: str | None = None) -> None:
            caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
            environment = os.environ | ({name: cache for name in caches} if cache else {})
            done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")

        def cold() -> None:
            with tempfile.TemporaryDirectory() as folder:
                python("-c", first_step, cache=folder)

        def train_help() -> Way:
            if importlib.util.find_spec("tyro") is None:
                raise NotInstalled("tyro is not installed")
            return functools.partial(python, "-m", "fastanila.train", "--help")

        first_step = _FIRST_STEP.format(device=str(device))
        ways: Builders = {
            "import torch": lambda: functools.partial(python, "-c", "import torch"),
            "from fastanila import AniLA": lambda: functools.partial(python, "-c", "from fastanila import AniLA"),
            "train --help": train_help,
            "first compiled step, empty caches": lambda: cold,
            "first compiled step, full caches": lambda: functools.partial(python, "-c", first_step, cache=warm),
        }
        return {"import torch": ways["import torch"]} if quick else ways

    limits = {"train --help": 2.0}
    return Row("startup", "start-up, a process each", (), "", build, at_most=limits, host=True, once=True)
