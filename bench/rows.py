"""The rows of the table, and the order in which a run on a GPU takes them."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

import torch

from fastanila.graphs import compiled

from . import limits, workloads
from .chain_rows import IMAGES, MIXTURE, MLPS, chain_rows
from .compiled_rivals import fresh_compile, plain_step
from .rivals import NotInstalled, eager_step
from .row import COMPILED, COPY, GROUPS, OURS, Builders, Row
from .update_rows import update_rows
from .workloads import Way


def rows(device_type: str) -> list[Row]:
    """The table's rows on "cuda" or "cpu"."""
    found = [
        *step_rows(device_type),
        *noise_rows(device_type),
        *chain_rows(device_type),
        *update_rows(device_type),
        host_row(),
        startup_row(device_type),
    ]
    return sorted(found, key=lambda row: GROUPS.index(row.group))


#: Works that a run on a GPU takes first, lest it run out of time before them, and groups that it takes last.
FIRST = (
    *[f"step, 2^{exponent}, {dtype}" for exponent in (26, 28, 24) for dtype in workloads.DTYPES],
    *[chains.title for chains in (MLPS["mlp-64", (1024, 2)], MLPS["mlp-64", (64, 8)], MIXTURE)],
    f"exact: {MLPS['mlp-64', (1024, 2)].title}",
    "one update, rings, the default, K=60",
    *[IMAGES[precision].title for precision in ("bf16", "tf32", "float32")],
    "one update, rings, K=60",
    *[MLPS[network, (1024, 128)].title for network in ("mlp-64", "mlp-128")],
)
LAST = ("host", "noise", "startup")


def in_order_of_interest(found: Sequence[Row]) -> list[Row]:
    def place(row: Row) -> int:
        if row.work in FIRST:
            return FIRST.index(row.work)
        return len(FIRST) + (1 + LAST.index(row.group) if row.group in LAST else 0)

    return sorted(found, key=place)


# ------------------------------------------------------------------------------------------------- step and noise


def on_arguments(elements: int, dtype: str, device: torch.device) -> Callable[..., Way]:
    """(function, names of its arguments; default all) -> a call of it on the step's arguments, which are made once."""

    @functools.cache
    def arguments() -> dict:
        return workloads.step_arguments(elements, dtype, device)

    return lambda function, *names: functools.partial(function, *(arguments()[name] for name in names or arguments()))


def step_rows(device_type: str) -> list[Row]:
    exponents = (12, 16, 20, 22, 24, 26, 28) if device_type == "cuda" else (12, 16, 20, 24)
    return [step_row(device_type, exponent, dtype) for dtype in workloads.DTYPES for exponent in exponents]


def step_row(device_type: str, exponent: int, dtype: str) -> Row:
    cuda, elements = device_type == "cuda", 1 << exponent
    is_compiled = not cuda or exponent in (16, 24, 26, 28)  # on CUDA four sizes show the curve

    def build(device, closing) -> Builders:
        of, step = on_arguments(elements, dtype, device), workloads.anisotropic_step
        ways: Builders = {
            OURS: lambda: of(step if cuda else compiled(step)),
            COPY: lambda: workloads.device_copy(elements, dtype, device),
            "eager": lambda: of(eager_step, "z", "score"),
        }
        if not cuda and exponent <= 20:  # on CUDA the operator as it stands is the first way
            ways["fastanila, not compiled"] = lambda: of(step)
        if is_compiled:
            ways[COMPILED] = lambda: of(fresh_compile(plain_step), "z", "score")
        if cuda and exponent == 26:
            ways["torch.compile, rand4x"] = lambda: of(fresh_compile(plain_step, rand4x=True), "z", "score")
        return ways

    if cuda and exponent >= 24:
        of_compiled = {"float32": 1.4, "bfloat16": 2.5}[dtype]
        goals = {COPY: limits.OF_A_COPY, COMPILED: of_compiled, "eager": limits.eager_over_step()}
    else:
        goals = {"eager": 1.0} if cuda else {"eager": 4.0, COMPILED: 2.0}
    return Row(
        "step", f"step, 2^{exponent}, {dtype}", (elements,), dtype, build, {OURS: goals},
        bytes_moved=workloads.step_bytes(elements, dtype), queued=True,
    )  # fmt: skip


def noise_rows(device_type: str) -> list[Row]:
    def row(exponent: int) -> Row:
        def build(device, closing) -> Builders:
            of = on_arguments(1 << exponent, "float32", device)
            return {
                OURS: lambda: of(compiled(workloads.normals), "z", "seed", "step"),
                "torch.randn": lambda: of(torch.randn_like, "z"),
            }

        goals = {} if device_type == "cuda" else {OURS: {"torch.randn": 3.0}}
        return Row("noise", f"normals, 2^{exponent}", (1 << exponent,), "float32", build, goals, queued=True)

    exponents = (24,) if device_type == "cuda" else (16, 20, 24)
    return [row(exponent) for exponent in exponents]


# ---------------------------------------------------------------------------------------------- host and start-up


def host_row() -> Row:
    def build(device, closing) -> Builders:
        of, step = on_arguments(64, "float32", device), workloads.anisotropic_step
        return {
            OURS: lambda: of(step),
            "fastanila, compiled": lambda: of(compiled(step)),
            "eager step": lambda: of(eager_step, "z", "score"),
            "torch.add": lambda: of(torch.add, "z", "score"),
        }

    return Row("host", "host time of one eager call, 64 elements", (64,), "float32", build, host=True)


_FIRST_STEP = """
import torch
from fastanila import ops
from fastanila.graphs import compiled
def step(z, score, threshold, seed, t):
    return ops.anisotropic_step(z, score, threshold, seed=seed, step=t)
z = torch.zeros(512, 2)
one, word = torch.ones((), device=z.device), torch.ones((), dtype=torch.int64, device=z.device)
compiled(step)(z, z, one, word, word)
"""


def startup_row(device_type: str) -> Row:
    def build(device, closing) -> Builders:
        warm = closing.enter_context(tempfile.TemporaryDirectory())

        def cold() -> None:
            with tempfile.TemporaryDirectory() as folder:
                python("-c", _FIRST_STEP, cache=folder)

        def train_help() -> Way:
            if importlib.util.find_spec("tyro") is None:
                raise NotInstalled("tyro is not installed")
            return functools.partial(python, "-m", "fastanila.train", "--help")

        ways: Builders = {
            line: functools.partial(functools.partial, python, "-c", line)
            for line in ("import torch", "from fastanila import AniLA")
        }
        ways["train --help"] = train_help
        if device.type == "cpu":  # not on a GPU, whose time is dearer
            ways["first compiled step, empty caches"] = lambda: cold
            ways["first compiled step, full caches"] = lambda: functools.partial(python, "-c", _FIRST_STEP, cache=warm)
        return ways

    return Row(
        "startup", "start-up, a process each", (), "", build, at_most={"train --help": 2.0}, host=True, once=True,
        rounds=1 if device_type == "cuda" else 3,
    )  # fmt: skip


def python(*arguments: str, cache: str | None = None) -> None:
    """Run it, with the compilers' caches in that folder. Raises RuntimeError with its last line if it fails."""
    caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = os.environ | ({name: cache for name in caches} if cache else {})
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
