"""The rows of whole runs: chains of every network, and updates of the parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from fastanila.training import job as job_training
from fastanila.training.settings import Settings

from . import limits, rival_updates, rivals, workloads
from .row import CAPTURED, OURS, Builders, Row
from .workloads import Chains, Way

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


def chain_rows(device_type: str, quick: bool) -> list[Row]:
    if quick:
        works = [Chains("mixture", (64, 2), 5)]
    elif device_type == "cpu":
        works = [MIXTURE, MLPS["mlp-64", (1024, 2)], dataclasses.replace(IMAGES["float32"], steps=10)]
    else:
        works = [MIXTURE, *MLPS.values(), *IMAGES.values()]
    found = [chain_row(device_type, work, quick) for work in works]
    if quick:
        return found
    found += [exact_row(work) for work in (MIXTURE, MLPS["mlp-64", (1024, 2)])]
    images = dataclasses.replace(IMAGES["float32"], steps=10 if device_type == "cpu" else 100)
    return found + [adjusted_row(images, norm) for norm in ("chain", "element")]


def chain_row(device_type: str, chains: Chains, quick: bool) -> Row:
    def build(device, closing) -> Builders:
        return chain_ways(chains, device, quick)

    goals = cuda_chain_goals(chains) if device_type == "cuda" else {OURS: cpu_chain_goals(chains)}
    group = "convnet" if chains.is_image else "chains"
    return Row(group, chains.title, chains.shape, chains.precision, build, goals)


UNADJUSTED = "fastanila, unadjusted"
PLAIN = "fastanila, --no-fused"  #: the plain definition, eagerly
MALA_BY_HAND = "eager, MALA"  #: the exact sampler that is nearest, by hand at its best


def exact_row(chains: Chains) -> Row:
    """Runs of adjusted AniLA by the public face, beside AniLA, MALA by hand, and on a CPU the plain definition, which
    the host of a GPU holds up for a second a call."""

    def build(device, closing) -> Builders:
        ways: Builders = {OURS: lambda: chains.exact(device)}
        if device.type == "cuda":
            ways[CAPTURED] = lambda: chains.exact_captured(device)
        ways |= {
            UNADJUSTED: lambda: chains.ours("AniLA", device),
            MALA_BY_HAND: lambda: rivals.mala_loop(chains, device),
        }
        if device.type != "cuda":
            ways[PLAIN] = lambda: workloads.plainly(chains.exact(device, compile=False))
        return ways

    goals = {OURS: {MALA_BY_HAND: 1.0}}
    return Row("chains", f"exact: {chains.title}", chains.shape, chains.precision, build, goals)


def adjusted_row(chains: Chains, norm: str) -> Row:
    """What the Metropolis correction costs: transitions of adjusted AniLA, beside those of AniLA."""

    def build(device, closing) -> Builders:
        return {
            OURS: lambda: chains.transitions(chains.with_norm(norm, adjusted=True), device),
            UNADJUSTED: lambda: chains.transitions(chains.with_norm(norm, adjusted=False), device),
        }

    work = f"adjusted, a gain per {norm}: {chains.title}"
    return Row("convnet", work, chains.shape, chains.precision, build, {OURS: {UNADJUSTED: 1 / 1.1}})


# ------------------------------------------------------------------------------------------------ the ways of a chain


def chain_ways(chains: Chains, device: torch.device, quick: bool) -> Builders:
    ways: Builders = {OURS: lambda: chains.ours("AniLA", device)}
    if device.type == "cuda" and in_one_kernel(chains) and chains.network != "mixture":
        ways[CAPTURED] = lambda: chains.ours_captured("AniLA", device)
    if has_our_langevin(chains):
        ways["fastanila, Langevin"] = lambda: chains.ours("Langevin", device)
    ways |= {
        "torchebm": lambda: rivals.torchebm_langevin(chains, device),
        "ebmkit": lambda: rivals.ebmkit_langevin(chains, device),
        "eager loop": lambda: rivals.eager_loop(chains, "AniLA", device),
        "eager loop, Langevin": lambda: rivals.eager_loop(chains, "Langevin", device),
    }
    if not (chains.is_image and device.type == "cuda"):  # there the host holds it up for seconds a call
        ways["the authors' form"] = lambda: rivals.authors_loop(chains, device)
    if chains.is_image:
        ways["eager loop, channels_last"] = lambda: rivals.eager_loop(chains, "AniLA", device, channels_last=True)
        ways["its convolutions alone"] = lambda: rivals.convolutions_alone(chains, device)
        ways[FLOOR] = lambda: rivals.convolutions_alone(chains, device, beside=pointwise_bytes(chains))
    if chains.precision == "bf16":
        float32 = dataclasses.replace(chains, precision="float32")
        ways["eager loop in float32"] = lambda: rivals.eager_loop(float32, "AniLA", device)
    return ways if quick else ways | compiled_ways(chains, device)


def compiled_ways(chains: Chains, device: torch.device) -> Builders:
    """The loop through torch.compile, in its forms: those captured by hand last."""

    @functools.cache
    def step(kind: str, **options):
        return rivals.compiled_step(chains, kind, device, **options)

    ways: Builders = {"torch.compile": lambda: rivals.compiled_loop(chains, step("AniLA"), device)}
    if device.type != "cuda":
        return ways
    if chains in _REDUCE_OVERHEAD:
        ways["torch.compile, reduce-overhead"] = lambda: rivals.reduce_overhead_loop(
            chains, step("AniLA", cudagraphs=True), device
        )
    if chains == MLPS["mlp-64", (1024, 2)]:
        ways["torch.compile, rand4x"] = lambda: rivals.compiled_loop(chains, step("AniLA", rand4x=True), device)
        ways["torch.compile, reduce-overhead, rand4x"] = lambda: rivals.reduce_overhead_loop(
            chains, step("AniLA", cudagraphs=True, rand4x=True), device
        )
    ways[_BY_HAND] = lambda: rivals.captured_loop(chains, step("AniLA"), device)
    return ways


_BY_HAND = "torch.compile, captured by hand"
FLOOR = "its convolutions, and a pass over the bytes between them"


def pointwise_bytes(chains: Chains) -> list[int]:
    """What kernels other than its convolutions have to move in a transition of an image chain, kernel by kernel."""
    width, itemsize = int(chains.network.partition("-")[2]), 2 if chains.precision == "bf16" else 4
    return limits.pointwise_bytes(chains.shape, width, itemsize)


def in_one_kernel(chains: Chains) -> bool:
    """Whether fastanila makes all transitions in one kernel, on CUDA."""
    return not chains.is_image and chains.shape[1] <= 8


def has_our_langevin(chains: Chains) -> bool:
    return not chains.is_image or chains.precision == "float32"


# ---------------------------------------------------------------------------------------------------------- the goals


def cuda_chain_goals(chains: Chains) -> dict[str, dict[str, float]]:
    """By which of our ways they are held against: captured chains and whole-chain kernels have goals of their own."""
    goals = {"eager loop": 1.0}
    if has_our_langevin(chains):
        goals["fastanila, Langevin"] = 1 / 1.01
    if chains.is_image:
        goals |= {
            "float32": {FLOOR: 1 / 1.1},
            "tf32": {"eager loop": 2.5, "eager loop, channels_last": 2.5},
            "bf16": {"eager loop": 3.0, "eager loop, channels_last": 3.0, "eager loop in float32": 5.0},
        }[chains.precision]
        return {OURS: goals}
    compiled = list(compiled_ways(chains, torch.device("cuda")))
    loops = ("torchebm", "eager loop", "eager loop, Langevin")
    captured = at_least(chains, whole=False)
    of_captured = dict.fromkeys(loops, min(20.0, captured.eager))
    of_captured |= dict.fromkeys((way for way in compiled if way != _BY_HAND), min(3.0, captured.launched))
    if not in_one_kernel(chains):
        return {OURS: goals | of_captured}
    whole = at_least(chains, whole=True)
    goals |= {
        way: min(10.0, whole.captured if way == _BY_HAND or "reduce-overhead" in way else whole.launched)
        for way in compiled
    }
    if chains.shape in ((64, 8), (1024, 2)):
        goals |= dict.fromkeys(loops, min(100.0, whole.eager))
    return {OURS: goals} if chains.network == "mixture" else {OURS: goals, CAPTURED: of_captured}


def at_least(chains: Chains, whole: bool) -> limits.Least:
    """How many times our time others take at the least, by what each has to do: a goal beyond it could not be met.

    ``whole``: our time is that of the whole-chain kernel, else of transitions captured as one CUDA graph.
    """
    if chains.network == "mixture":
        return limits.over_whole_mixture(chains.steps)
    width = int(chains.network.partition("-")[2])
    return (limits.over_whole_mlp if whole else limits.over_captured_mlp)(*chains.shape, width, chains.steps)


def cpu_chain_goals(chains: Chains) -> dict[str, float]:
    if chains.network == "mixture":
        return dict.fromkeys(("torchebm", "ebmkit", "eager loop", "eager loop, Langevin"), 3.0)
    loops = ["torchebm", "eager loop", "eager loop, Langevin"]
    return dict.fromkeys([*loops, "eager loop, channels_last"], 1.3) if chains.is_image else dict.fromkeys(loops, 1.0)


# -------------------------------------------------------------------------------------------------------- updates


def update_rows(device_type: str, quick: bool) -> list[Row]:
    steps = 2 if quick else 60
    cuda = device_type == "cuda"
    rings = update_row(
        f"one update, rings, K={steps}", (512, 2), "float32", workloads.rings_settings, steps,
        {"the authors' form": 40.0 if cuda else 1.0, "eager": 1.0},
    )  # fmt: skip
    found = [default_row(steps), rings, amortized_row(steps)]
    if cuda and not quick:
        images = update_row(
            f"one update, 64 x 3x32x32, K={steps}, bf16", (64, 3, 32, 32), "bf16",
            functools.partial(workloads.image_settings, precision="bf16"), steps, {"eager": 1.0},
        )  # fmt: skip
        found.append(images)
    return found


def default_row(steps: int) -> Row:
    """The job of a bare `python -m fastanila.train --fused`, whose sampler is exact, K transitions an update."""

    def build(device, closing) -> Builders:
        def settings(sampler: str | None = None) -> Settings:
            return closing.enter_context(workloads.rings_settings(device, steps=steps, sampler=sampler))

        def ours(**changes) -> Way:
            return workloads.our_update(dataclasses.replace(settings(), **changes))[1]

        return {
            OURS: ours,
            UNADJUSTED: lambda: workloads.our_update(settings("anila"))[1],
            PLAIN: lambda: workloads.plainly(ours(fused=False)),
            MALA_BY_HAND: lambda: by_hand(rival_updates.eager_mala_update, job_training.prepare(settings()), "float32"),
        }

    goals = {OURS: {MALA_BY_HAND: 1.0, PLAIN: 1.0}}
    return Row("update", f"one update, rings, the default, K={steps}", (512, 2), "float32", build, goals)


def amortized_row(steps: int) -> Row:
    """Proposals, chain and the updates of both networks, beside the plain definition and chains that persist."""

    def build(device, closing) -> Builders:
        def way(**changes) -> Way:
            settings = closing.enter_context(workloads.rings_settings(device, steps=steps))
            return workloads.our_update(dataclasses.replace(settings, **changes))[1]

        return {
            OURS: lambda: way(init="vae"),
            PLAIN: lambda: workloads.plainly(way(init="vae", fused=False)),
            "fastanila, persistent chains": way,
        }

    return Row("update", f"one update, rings, a VAE proposes, K={steps}", (512, 2), "float32", build)


def update_row(
    work: str, shape: tuple[int, ...], dtype: str, settings_of, steps: int, goals: dict[str, float]
) -> Row:  # fmt: skip
    def build(device, closing) -> Builders:
        @functools.cache
        def prepared() -> tuple[job_training.Job, Way]:
            return workloads.our_update(closing.enter_context(settings_of(device, steps=steps)))

        ways: Builders = {
            OURS: lambda: prepared()[1],
            "eager": lambda: by_hand(rival_updates.eager_update, prepared()[0], dtype),
        }
        if not (len(shape) == 4 and device.type == "cuda"):  # there the host holds it up for a second a call
            ways["the authors' form"] = lambda: by_hand(rival_updates.authors_update, prepared()[0], dtype)
        return ways

    return Row("update", work, shape, dtype, build, {OURS: goals})


def by_hand(form: Callable[..., Way], job: job_training.Job, dtype: str) -> Way:
    """An update in one of the forms of `rival_updates`, of the job's network on the job's data."""
    energy = workloads.Ordinary(job.ebm.module, dtype).to(job.device)
    pool = job.data.draw(4096, seed=0, step=0, device=job.device)
    update = form(energy, pool, job.settings.batch_size, job.settings.chains, job.settings)
    return workloads.in_precision(update, dtype)
