"""The rows of the table, and the order in which a run on a GPU takes them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch

from fastanila.graphs import compiled

from . import limits, rivals, workloads
from .chain_rows import IMAGES, MIXTURE, MLPS, chain_rows, update_rows
from .rivals import NotInstalled
from .row import GROUPS, OURS, Builders, Row
from .workloads import Way


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


def step_rows(device_type: str, quick: bool) -> list[Row]:
    exponents = (12, 16, 20, 22, 24, 26, 28) if device_type == "cuda" else (12, 16, 20, 24)
    if quick:
        return [step_row(device_type, 1 << 12, "float32", quick)]
    return [step_row(device_type, 1 << e, dtype, quick) for dtype in workloads.DTYPES for e in exponents]


def step_row(device_type: str, elements: int, dtype: str, quick: bool) -> Row:
    cuda = device_type == "cuda"
    # on CUDA four sizes show the curve, and each compiles anew
    compare_compiled = () if quick else (1 << 16, 1 << 24, 1 << 26, 1 << 28) if cuda else (elements,)

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
        if elements in compare_compiled:
            ways["torch.compile"] = lambda: by_hand(rivals.fresh_compile(rivals.plain_step))
        if cuda and elements == 1 << 26:
            ways["torch.compile, rand4x"] = lambda: by_hand(rivals.fresh_compile(rivals.plain_step, rand4x=True))
        return ways

    if cuda and elements >= 1 << 24:
        goals = {
            "copy of the same bytes": limits.OF_A_COPY,
            "torch.compile": {"float32": 1.4, "bfloat16": 2.5}[dtype],
            "eager": limits.eager_over_step(),
        }
    else:
        goals = {"eager": 1.0} if cuda else {"eager": 4.0, "torch.compile": 2.0}
    exponent = elements.bit_length() - 1
    return Row(
        "step", f"step, 2^{exponent}, {dtype}", (elements,), dtype, build, {OURS: goals},
        bytes_moved=workloads.step_bytes(elements, dtype), queued=True,
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

        goals = {} if device_type == "cuda" else {OURS: {"torch.randn": 3.0}}
        return Row("noise", f"normals, 2^{exponent}", (1 << exponent,), "float32", build, goals, queued=True)

    exponents = (24,) if device_type == "cuda" else (16, 20, 24)
    return [row(exponent) for exponent in ((12,) if quick else exponents)]


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
from fastanila.graphs import compiled
def step(z, score, threshold, seed, t):
    return ops.anisotropic_step(z, score, threshold, seed=seed, step=t)
z = torch.zeros(512, 2)
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
                python("-c", _FIRST_STEP, cache=folder)

        def train_help() -> Way:
            if importlib.util.find_spec("tyro") is None:
                raise NotInstalled("tyro is not installed")
            return functools.partial(python, "-m", "fastanila.train", "--help")

        ways: Builders = {"import torch": lambda: functools.partial(python, "-c", "import torch")}
        if quick:
            return ways
        ways["from fastanila import AniLA"] = lambda: functools.partial(python, "-c", "from fastanila import AniLA")
        ways["train --help"] = train_help
        if device.type == "cpu":  # not on a GPU, whose time is dearer
            ways["first compiled step, empty caches"] = lambda: cold
            ways["first compiled step, full caches"] = lambda: functools.partial(python, "-c", _FIRST_STEP, cache=warm)
        return ways

    limits = {"train --help": 2.0}
    return Row(
        "startup", "start-up, a process each", (), "", build, at_most=limits, host=True, once=True,
        rounds=1 if device_type == "cuda" else 3,
    )  # fmt: skip
