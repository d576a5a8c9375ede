"""Counts what a chain or an update launches, without a GPU:

    python tests/support/nodes.py                     # every case: how many launches, and what a capture forbids
    python tests/support/nodes.py --list              # the cases' names
    python tests/support/nodes.py "transition: mlp"   # one case, with its launches by name

A case runs on the device without kernels (fake_device.py). tests/test_capture_rules.py holds the counts to budgets. Who
adds a sampler or an energy adds a case here and sees what it costs; g++ and a torch with CUDA are all it needs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

import fake_device
from fastanila import MALA, AdjustedAniLA, AniLA, Langevin, Preconditioned, ReplicaExchange
from fastanila.models import MLP, ConvNet, GaussianMixture
from fastanila.samplers import whole_chain
from fastanila.samplers.sampler import Sampler
from fastanila.training import job
from fastanila.training import update as update_training
from fastanila.training.build import at_precision, matmul_precision
from fastanila.training.settings import Settings

# --------------------------------------------------------------------------------------------- what is counted, and how


class Counted(NamedTuple):
    """What a case launched."""

    launches: list[str]  #: names: of one transition, one update or one run
    graphs: int  #: captured by calls that can share one graph
    replays: int  #: of graphs, in those calls
    violations: list[str]  #: what was done that a capture forbids


Case = Callable[[], Counted]


def afresh(case: Case) -> Case:
    """The case with nothing compiled yet: what others compiled does not count against Dynamo's limits."""

    def counted() -> Counted:
        torch._dynamo.reset()
        return case()

    return counted


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """No kernel makes a whole chain."""
    fitting = whole_chain._fitting
    whole_chain._fitting = lambda *arguments: "each transition is to be seen"
    try:
        yield
    finally:
        whole_chain._fitting = fitting


def transition(
    energy: Callable[[], nn.Module], shape: tuple[int, ...], sampler: Sampler, precision: str = "float32"
) -> Case:
    """The nodes that a transition adds to a captured chain: those of a graph of n + 1 transitions less those of one
    of n, so that what a graph has but once does not count."""

    def case() -> Counted:
        device, z = fake_device.Device(), torch.rand(shape).cuda()
        network = at_precision(energy(), precision).cuda()

        def run(count: int) -> list[list[str]]:
            with one_by_one(), matmul_precision(precision):
                sampler.run(network, z, steps=count, seed=1)
            return device.graphs

        device.clear()
        run(6)
        short, replays = run(6), device.replays
        long = run(7)
        if not len(long) > len(short) > 0:
            raise AssertionError(f"6 transitions made {len(short)} graphs, and 7 made {len(long) - len(short)}")
        added = collections.Counter(long[-1]) - collections.Counter(short[-1])
        return Counted(list(added.elements()), len(short), len(replays), device.violations)

    return case


def update(**settings: Any) -> Case:
    """The nodes of the graph of one update of a training run."""
    return lambda: _update(Settings(**settings, device="cuda"))


def image_update(**settings: Any) -> Case:
    """The same on images of CIFAR-10's shape, whose pixels are random."""

    def case() -> Counted:
        from bench.workloads import image_settings  # the repository is on the path where cases run

        with image_settings(torch.device("cuda")) as images:
            return _update(dataclasses.replace(images, **settings))

    return case


def _update(settings: Settings) -> Counted:
    device = fake_device.Device()
    with fake_device.tensor_learning_rates(), matmul_precision(settings.precision):
        update = update_training.build_update(job.prepare(settings), matches=bool(settings.matching))
        device.clear()
        for _ in range(update_training.WARM_UP + 2):
            update()
    if not device.graphs:
        raise AssertionError("no update was captured")
    return Counted(device.graphs[-1], len(device.graphs), len(device.replays), device.violations)


def run(energy: Callable[[], nn.Module], shape: tuple[int, ...], sampler: Sampler) -> Case:
    """What the second `Sampler.run` launches for 100 transitions, the nodes of graphs that it replays included."""

    def case() -> Counted:
        device, z, network = fake_device.Device(), torch.rand(shape).cuda(), energy().cuda()
        sampler.run(network, z, steps=100, seed=1)
        device.clear()
        sampler.run(network, z, steps=100, seed=1, step=100)
        launches = [name for name in device.operations if name != "graph"]
        launches += ["node of a replayed graph"] * sum(device.replays)
        return Counted(launches, len(device.graphs), len(device.replays), device.violations)

    return case


# ---------------------------------------------------------------------------------------------------------------- cases

ANILA, FROZEN, LANGEVIN = AniLA(0.5, 0.1), AniLA(0.5, 0.1, refresh="update"), Langevin(0.1)
ADJUSTED = AdjustedAniLA(1.0, 0.1)


def mixture() -> nn.Module:
    return GaussianMixture(torch.eye(2))


def mlp() -> nn.Module:
    """The default job's."""
    return MLP(2, 64, features=64, feature_scale=1.5, confinement=0.5)


def convnet() -> nn.Module:
    return ConvNet(3, 16, 8)


VECTORS, IMAGES = (65, 2), (5, 3, 16, 16)
SMALL = dict(sampler="anila", steps=4, batch_size=32, chains=32, width=16, features=8, iterations=50, seed=3)
SMALL_IMAGES = SMALL | dict(data="digits", energy="convnet", width=8, features=0)

CASES: dict[str, Case] = {
    "transition: mlp, 128-d": transition(lambda: MLP(128, 64), (64, 128), ANILA),
    "transition: convnet, float32": transition(convnet, IMAGES, ANILA),
    "transition: convnet, tf32": transition(convnet, IMAGES, ANILA, "tf32"),
    "transition: convnet, bf16": transition(convnet, IMAGES, ANILA, "bf16"),
    "transition: mlp, adjusted": transition(mlp, VECTORS, ADJUSTED),
    "transition: mlp": transition(mlp, VECTORS, ANILA),
    "transition: mlp, langevin": transition(mlp, VECTORS, LANGEVIN),
    "transition: mlp, a frozen gain": transition(mlp, VECTORS, FROZEN),
    "transition: mixture": transition(mixture, VECTORS, ANILA),
    "transition: mixture, langevin": transition(mixture, VECTORS, LANGEVIN),
    "transition: mixture, a frozen gain": transition(mixture, VECTORS, FROZEN),
    "transition: convnet, langevin": transition(convnet, IMAGES, LANGEVIN),
    "transition: convnet, a frozen gain": transition(convnet, IMAGES, FROZEN),
    "transition: convnet, bf16, langevin": transition(convnet, IMAGES, LANGEVIN, "bf16"),
    "transition: convnet, bf16, a frozen gain": transition(convnet, IMAGES, FROZEN, "bf16"),
    "transition: convnet, adjusted by chain": transition(convnet, IMAGES, AdjustedAniLA(50.0, 0.001, norm="chain")),
    "transition: convnet, adjusted by element": transition(convnet, IMAGES, ADJUSTED),
    "transition: mlp, 5 replicas": transition(mlp, VECTORS, ReplicaExchange.of(ADJUSTED, replicas=5, highest=9.0)),
    "transition: mlp, a metric": transition(mlp, VECTORS, Preconditioned(ADJUSTED, torch.tensor([0.5, 1.6]))),
    "run: mixture": run(mixture, VECTORS, ANILA),
    "run: mlp": run(mlp, VECTORS, ANILA),
    "run: mixture, adjusted": run(mixture, VECTORS, ADJUSTED),
    "run: mlp, adjusted": run(mlp, VECTORS, ADJUSTED),
    "run: mlp, mala": run(mlp, VECTORS, MALA(0.1)),
    "update: rings, anila": update(sampler="anila", steps=60),
    "update: rings, the default": update(steps=60),
    "update: rings, a vae proposes": update(sampler="anila", steps=60, init="vae"),
    "update: images, bf16": image_update(steps=60, precision="bf16"),
    "update: rings, small": update(**SMALL),
    "update: rings, other options": update(
        **SMALL, init="noise", energy_l2=0.1, data_noise=0.1, clip_grad=0.1, refresh="update", norm="chain"
    ),
    "update: rings, adjusted": update(**SMALL | dict(sampler="anila-mh", threshold=1.0)),
    "update: rings, replicas": update(**SMALL | dict(sampler="anila-mh", threshold=1.0, replicas=3)),
    "update: rings, hmc": update(**SMALL | dict(sampler="hmc", leapfrog_steps=3)),
    "update: digits": update(**SMALL_IMAGES, clip_grad=1.0),
    "update: digits, bf16": update(**SMALL_IMAGES, precision="bf16"),
    "update: digits, the warm-up by matching": update(**SMALL_IMAGES, matching=10, activation="silu", flips=True),
    "update: digits, matching beside the likelihood": update(**SMALL_IMAGES, matching_weight=1.0, activation="silu"),
    "update: digits, classes": update(**SMALL_IMAGES, classes=True),
    "update: rings, weighted": update(**SMALL | dict(sampler="mala", init="weighted", witnesses=16)),
    "update: digits, weighted": update(**SMALL_IMAGES | dict(sampler="mala", init="weighted", step_size=0.01)),
    "update: rings, a small vae": update(**SMALL, init="vae", vae_width=16, vae_warm_up=2),
    "update: digits, completion": update(
        **SMALL | dict(data="digits", width=8, features=0),
        init="vae", task="completion", mask="blocks", vae_width=8, latent=4,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the command


def counts(names: list[str]) -> dict[str, dict]:
    """By case, {"result": a `Counted` as a list} or {"error": its traceback}, of a process under the device."""
    return fake_device.run(__file__, names)


def report(name: str, found: dict, in_full: bool) -> str:
    if "error" in found:
        return f"{name}: failed\n{found['error']}"
    counted = Counted(*found["result"])
    lines = [f"{name}: {len(counted.launches)} launches, {counted.graphs} graphs captured, {counted.replays} replays"]
    lines += [f"  VIOLATION {what}" for what in counted.violations]
    if in_full:
        lines += [f"  {times:3} x {what}" for what, times in collections.Counter(counted.launches).items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases by name; all if none is given")
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; --list has them")
    if arguments.list:
        print("\n".join(CASES))
        return
    if reason := fake_device.unavailable():
        sys.exit(reason)
    for name in arguments.cases or CASES:
        print(report(name, counts([name])[name], bool(arguments.cases)), flush=True)


if __name__ == "__main__":
    if fake_device.is_case(sys.argv[1:]):
        warnings.filterwarnings("error", message=".*(uncaptured|does not compile as one graph)")
        fake_device.main({name: afresh(case) for name, case in CASES.items()}, sys.argv[1:])
    else:
        main()
