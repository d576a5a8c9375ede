"""How large a program of a kernel is best launched: `python -m bench.studies.launch_sizes`, on a GPU.

The step in every size of STEP_SIZES beside a copy of the same bytes, and 100 transitions on the whole-chain kernel of
an MLP in every size of MLP_SIZES: microseconds of the device, and of the host until the call returns.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from fastanila import AdjustedAniLA, AniLA
from fastanila.kernels import mlp, step
from fastanila.models import MLP

from .. import markdown, workloads
from ..timing import measure

#: Sizes of the step's launch that may be chosen: elements and warps of a program.
STEP_SIZES = ((2048, 4), (1024, 4), (2048, 8), (512, 2))
#: Of the whole-chain kernel of an MLP: chains and warps of a program; None is what it chooses by itself.
MLP_SIZES = (None, (8, 4), (8, 8), (4, 4), (4, 8), (16, 8))

Row = tuple[str, str, float, float]  #: what is timed, its size, and the times of the device and the host


def times(work: str, ways: dict[str, Callable[[], object]], device: torch.device) -> Iterator[Row]:
    for way in ways.values():
        way()
    of_device, of_host = (measure(ways, device, rounds=5, **how) for how in ({"queued": True}, {"host": True}))
    for name in ways:
        yield work, name, 1e6 * of_device[name].median, 1e6 * of_host[name].median


def of_step(device: torch.device) -> Iterator[Row]:
    def way(size: tuple[int, int], arguments: dict) -> Callable[[], object]:
        def call():
            step.CONFIGURATION = step.Configuration(*size)
            return workloads.anisotropic_step(**arguments)

        return call

    for exponent, dtype in itertools.product((24, 26), workloads.DTYPES):
        arguments = workloads.step_arguments(1 << exponent, dtype, device)
        ways = {"copy": workloads.device_copy(1 << exponent, dtype, device)}
        ways |= {str(size): way(size, arguments) for size in STEP_SIZES}
        with mock.patch.object(step, "CONFIGURATION"):  # put back on leaving
            yield from times(f"step, 2^{exponent}, {dtype}", ways, device)


def of_mlp(device: torch.device) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    for features, chains in ((0, 1024), (64, 512), (0, 16384)):
        energy = MLP(2, 64, features=features, confinement=0.1).to(device)
        z = torch.randn(chains, 2, generator=generator).to(device)
        for sampler, size in itertools.product((AniLA(10.0, 0.005), AdjustedAniLA(10.0, 0.005)), MLP_SIZES):
            name = f"{type(sampler).__name__}, {chains:,} chains, {features} features"
            ways = {str(size): lambda s=sampler, e=energy, x=z: s.run(e, x, steps=100, seed=1)}
            try:
                with mlp_size(size):
                    yield from times(name, ways, device)
            except Exception as error:  # a size may be more than registers or shared memory hold
                print(f"{name}, {size}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def mlp_size(size: tuple[int, int] | None):
    """A context in which the MLP's whole-chain kernels have so many chains and warps a program."""
    chosen = mlp.mlp_constants

    def constants(*arguments, **named):
        found = chosen(*arguments, **named)
        return found if size is None or found is None else ({**found[0], "ROWS": size[0]}, size[1])

    return mock.patch.object(mlp, "mlp_constants", constants)


def main() -> int:
    device = torch.device("cuda")
    found = itertools.chain(of_step(device), of_mlp(device))
    rows = [[work, size, f"{of_device:.4g}", f"{of_host:.4g}"] for work, size, of_device, of_host in found]
    print(markdown.table(["work", "size", "device, us", "host, us"], "llrr", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
