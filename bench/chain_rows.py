"""The rows of chains: runs of every network, their ways and their goals."""

from __future__ import annotations

import dataclasses
import functools

import torch

from . import compiled_rivals, limits, rivals, workloads
from .row import AUTHORS, CAPTURED, COMPILED, MALA_BY_HAND, OURS, PLAIN, UNADJUSTED, Builders, Row
from .workloads import Chains

LANGEVIN = "fastanila, Langevin"
LOOPS = ("torchebm", "eager loop", "eager loop, Langevin")
CHANNELS_LAST = "eager loop, channels_last"
BY_HAND = "torch.compile, captured by hand"
FLOOR = "its convolutions, and a pass over the bytes between them"

MIXTURE = Chains("mixture", (10_000, 2), 100)
MLP_SHAPES = (((64, 8), 50), ((1024, 2), 100), ((16384, 2), 100), ((1024, 128), 200))
MLPS = {
    (network, shape): Chains(network, shape, steps) for network in ("mlp-64", "mlp-128") for shape, steps in MLP_SHAPES
}
IMAGES = {p: Chains("convnet-32", (64, 3, 32, 32), 100, p) for p in ("float32", "tf32", "bf16")}

#: Works that are also compiled with Inductor's CUDA graphs: on the others that would cost time and say nothing new.
_REDUCE_OVERHEAD = (
    MLPS["mlp-64", (1024, 2)],
    MLPS["mlp-64", (1024, 128)],
    MLPS["mlp-128", (1024, 128)],
    IMAGES["bf16"],
)


def chain_rows(device_type: str) -> list[Row]:
    if device_type == "cpu":
        images = dataclasses.replace(IMAGES["float32"], steps=10)
        works = [MIXTURE, MLPS["mlp-64", (1024, 2)], images]
    else:
        images = IMAGES["float32"]
        works = [MIXTURE, *MLPS.values(), *IMAGES.values()]
    found = [chain_row(device_type, work) for work in works]
    found += [exact_row(work) for work in (MIXTURE, MLPS["mlp-64", (1024, 2)])]
    return found + [adjusted_row(images, norm) for norm in ("chain", "element")]


def chain_row(device_type: str, chains: Chains) -> Row:
    def build(device, closing) -> Builders:
        return chain_ways(chains, device) | compiled_ways(chains, device)

    goals = cuda_goals(chains) if device_type == "cuda" else {OURS: cpu_goals(chains)}
    group = "convnet" if chains.is_image else "chains"
    return Row(group, chains.title, chains.shape, chains.precision, build, goals)


def exact_row(chains: Chains) -> Row:
    """Runs of adjusted AniLA by the public face, beside AniLA, MALA by hand, and on a CPU the plain definition, which
    the host of a GPU holds up for a second a call."""

    def build(device, closing) -> Builders:
        ways: Builders = {OURS: lambda: chains.ours("AdjustedAniLA", device)}
        if device.type == "cuda":
            ways[CAPTURED] = lambda: chains.captured("AdjustedAniLA", device)
        ways[UNADJUSTED] = lambda: chains.ours("AniLA", device)
        ways[MALA_BY_HAND] = lambda: rivals.mala_loop(chains, device)
        if device.type != "cuda":
            ways[PLAIN] = lambda: workloads.plainly(chains.ours("AdjustedAniLA", device, compile=False))
        return ways

    goals = {OURS: {MALA_BY_HAND: 1.0}}
    return Row("chains", f"exact: {chains.title}", chains.shape, chains.precision, build, goals)


def adjusted_row(chains: Chains, norm: str) -> Row:
    """What the Metropolis correction costs: transitions of adjusted AniLA, beside those of AniLA."""

    def build(device, closing) -> Builders:
        return {
            OURS: lambda: chains.transitions("AdjustedAniLA", norm, device),
            UNADJUSTED: lambda: chains.transitions("AniLA", norm, device),
        }

    work = f"adjusted, a gain per {norm}: {chains.title}"
    return Row("convnet", work, chains.shape, chains.precision, build, {OURS: {UNADJUSTED: 1 / 1.1}})


# ------------------------------------------------------------------------------------------------ the ways of a chain


def chain_ways(chains: Chains, device: torch.device) -> Builders:
    ways: Builders = {OURS: lambda: chains.ours("AniLA", device)}
    if device.type == "cuda" and in_one_kernel(chains) and chains.network != "mixture":
        ways[CAPTURED] = lambda: chains.captured("AniLA", device)
    if has_our_langevin(chains):
        ways[LANGEVIN] = lambda: chains.ours("Langevin", device)
    ways |= {
        "torchebm": lambda: rivals.torchebm_langevin(chains, device),
        "ebmkit": lambda: rivals.ebmkit_langevin(chains, device),
        "eager loop": lambda: rivals.eager_loop(chains, "AniLA", device),
        "eager loop, Langevin": lambda: rivals.eager_loop(chains, "Langevin", device),
    }
    if not (chains.is_image and device.type == "cuda"):  # there the host holds it up for seconds a call
        ways[AUTHORS] = lambda: rivals.authors_loop(chains, device)
    if chains.is_image:
        bytes_between = pointwise_bytes(chains)
        ways[CHANNELS_LAST] = lambda: rivals.eager_loop(chains, "AniLA", device, channels_last=True)
        ways["its convolutions alone"] = lambda: compiled_rivals.convolutions_alone(chains, device)
        ways[FLOOR] = lambda: compiled_rivals.convolutions_alone(chains, device, beside=bytes_between)
    if chains.precision == "bf16":
        float32 = dataclasses.replace(chains, precision="float32")
        ways["eager loop in float32"] = lambda: rivals.eager_loop(float32, "AniLA", device)
    return ways


def compiled_ways(chains: Chains, device: torch.device) -> Builders:
    """The loop through torch.compile, in its forms: those captured by hand last."""

    @functools.cache
    def step(**options: bool) -> compiled_rivals.Compiled:
        return compiled_rivals.compiled(chains, device, **options)

    def loop(**options: bool):
        return lambda: compiled_rivals.compiled_loop(chains, step(**options))

    def reduce_overhead(**options: bool):
        return lambda: compiled_rivals.reduce_overhead_loop(chains, step(cudagraphs=True, **options))

    ways: Builders = {COMPILED: loop()}
    if device.type != "cuda":
        return ways
    if chains in _REDUCE_OVERHEAD:
        ways["torch.compile, reduce-overhead"] = reduce_overhead()
    if chains == MLPS["mlp-64", (1024, 2)]:
        ways["torch.compile, rand4x"] = loop(rand4x=True)
        ways["torch.compile, reduce-overhead, rand4x"] = reduce_overhead(rand4x=True)
    ways[BY_HAND] = lambda: compiled_rivals.captured_loop(chains, step(), device)
    return ways


def pointwise_bytes(chains: Chains) -> list[int]:
    """What kernels other than its convolutions have to move in a transition of an image chain, kernel by kernel."""
    return limits.pointwise_bytes(chains.shape, chains.width, itemsize=2 if chains.precision == "bf16" else 4)


def in_one_kernel(chains: Chains) -> bool:
    """Whether fastanila makes all transitions in one kernel, on CUDA."""
    return not chains.is_image and chains.shape[1] <= 8


def has_our_langevin(chains: Chains) -> bool:
    return not chains.is_image or chains.precision == "float32"


# ---------------------------------------------------------------------------------------------------------- the goals


def cuda_goals(chains: Chains) -> dict[str, dict[str, float]]:
    """By which of our ways they are held against: captured chains and whole-chain kernels have goals of their own."""
    goals = {"eager loop": 1.0}
    if has_our_langevin(chains):
        goals[LANGEVIN] = 1 / 1.01
    if chains.is_image:
        goals |= {
            "float32": {FLOOR: 1 / 1.1},
            "tf32": dict.fromkeys(("eager loop", CHANNELS_LAST), 2.5),
            "bf16": {"eager loop": 3.0, CHANNELS_LAST: 3.0, "eager loop in float32": 5.0},
        }[chains.precision]
        return {OURS: goals}
    compiled = list(compiled_ways(chains, torch.device("cuda")))
    captured, whole = (at_least(chains, whole) for whole in (False, True))
    of_captured = dict.fromkeys(LOOPS, min(20.0, captured.eager))
    of_captured |= dict.fromkeys((way for way in compiled if way != BY_HAND), min(3.0, captured.launched))
    if not in_one_kernel(chains):
        return {OURS: goals | of_captured}
    goals |= {
        way: min(10.0, whole.captured if way == BY_HAND or "reduce-overhead" in way else whole.launched)
        for way in compiled
    }
    if chains.shape in ((64, 8), (1024, 2)):
        goals |= dict.fromkeys(LOOPS, min(100.0, whole.eager))
    return {OURS: goals} if chains.network == "mixture" else {OURS: goals, CAPTURED: of_captured}


def at_least(chains: Chains, whole: bool) -> limits.Least:
    """How many times our time others take at the least, by what each has to do: a goal beyond it could not be met."""
    if chains.network == "mixture":
        return limits.over_mixture(chains.steps)
    return limits.over_mlp(*chains.shape, chains.width, chains.steps, whole=whole)


def cpu_goals(chains: Chains) -> dict[str, float]:
    if chains.network == "mixture":
        return dict.fromkeys(("torchebm", "ebmkit", *LOOPS[1:]), 3.0)
    return dict.fromkeys((*LOOPS, CHANNELS_LAST), 1.3) if chains.is_image else dict.fromkeys(LOOPS, 1.0)
