"""Compile the kernels without a GPU, in the launch configuration the operators use, and disassemble them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fastanila.kernels import metropolis, mixture, mlp, step, step_rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Bytes of shared memory that one program may take.
SHARED_MEMORY = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


def compile_step(
    target: str, dtype: str = "fp32", *, lane=0, gamma=False, mask=False, bounds=False, pointers=True
) -> CompiledKernel:
    """The anisotropic step for a target of TARGETS; ``dtype`` is fp32, bf16 or fp16.

    ``pointers``: threshold, step size, noise scale, seed and step come as 0-dim tensors, as a sampler passes them.
    """
    block, warps = step.CONFIGURATION
    types, switches = _numbers(pointers)
    types |= _state_types(dtype, gamma, mask) | dict(n="i64", first_quad="i64", low="fp32", high="fp32")
    constants = switches | dict(LANE=lane, HAS_GAMMA=gamma, HAS_MASK=mask, HAS_BOUNDS=bounds, BLOCK=block)
    unaligned = ("mask_ptr",)  # as the kernel's decorator says
    return _compiled(step.anisotropic_step_kernel, target, types, constants, unaligned, num_warps=warps)


def compile_rows(
    target: str, dtype: str = "fp32", *, norm="element", channels=1, size=3072, statistics=False,
    gamma=False, mask=False, bounds=False, pointers=True, aligned=True,
) -> CompiledKernel:  # fmt: skip
    """The step with a shared norm or statistics, for chains of (channels, size), as `rows.launch` launches it.

    norm: "channel"; or "element", "chain" with channels 1. ``aligned``: the tensors start at multiples of 16 bytes.
    """
    kernel, tile = step_rows.rows_kernel, step_rows.tile_of(channels, size, norm)
    types, switches = _numbers(pointers)
    types |= _state_types(dtype, gamma, mask)
    types |= dict(chains="i64", channels="i64", units="i64", first="i64", low="fp32", high="fp32")
    types |= {f"{name}_ptr": "*fp32" if statistics else None for name in ("gamma_mean", "score_rms", "clip_fraction")}
    constants = switches | step_rows.constants(tile, size, norm)
    constants |= dict(HAS_GAMMA=gamma, HAS_MASK=mask, HAS_BOUNDS=bounds, STATISTICS=statistics)
    return _compiled(kernel, target, types, constants, () if aligned else types, num_warps=tile.num_warps)


def compile_metropolis(
    target: str, dtype: str = "fp32", *, norm="element", channels=1, size=3072, mask=False, pointers=True, aligned=True
) -> CompiledKernel:
    """Accept or reject and propose, for chains of (channels, size), as `metropolis.launch` launches it."""
    kernel, tile = metropolis.metropolis_kernel, metropolis.tile_of(channels, size, norm)
    types, switches = _numbers(pointers, noise_scale=False)
    states = ("z", "score", "proposal", "proposal_score", "z_out", "score_out", "next")
    types |= {f"{name}_ptr": f"*{dtype}" for name in states}
    types |= {f"{name}_ptr": "*fp32" for name in ("energy", "proposal_energy", "energy_out", "acceptance")}
    types |= dict(mask_ptr="*i1" if mask else None, chains="i64", channels="i64", units="i64", offset="i64")
    constants = switches | step_rows.constants(tile, size, norm) | dict(HAS_MASK=mask)
    return _compiled(kernel, target, types, constants, () if aligned else types, num_warps=tile.num_warps)


def compile_mixture_trajectory(target: str, *, dim=2, components=8, adjusted=False, **options) -> CompiledKernel:
    """The whole-chain kernel of a Gaussian mixture. ``options``: those of `_compile_trajectory`."""
    kernel, constants = mixture.mixture_kernel, mixture.mixture_constants(dim, components, adjusted)
    return _compile_trajectory(kernel, target, dict(components_="i32"), constants, 1, adjusted, **options)


def compile_mlp_trajectory(
    target: str, *, dim=2, width=64, depth=2, features=0, chains=1024, silu=True, adjusted=False, shared=None, **options
) -> CompiledKernel:
    """The whole-chain kernel of an MLP energy as launched for that many chains on that target, given ``shared`` bytes
    of shared memory, or all of the target's. ``options``: those of `_compile_trajectory`."""
    constants, warps = mlp.mlp_constants(dim, width, depth, features, chains, shared or SHARED_MEMORY[target])
    types = dict(confinement="fp32", leak="fp32")
    types |= {f"{kind}{layer}_ptr": None for layer in range(depth, 3) for kind in "wb"}
    if not features:
        types["projections_ptr"] = None
    return _compile_trajectory(
        mlp.mlp_kernel, target, types, constants | dict(SILU=silu), warps, adjusted, **options
    )  # fmt: skip


def _compile_trajectory(
    kernel, target, types, constants, warps, adjusted, chain_norm=False, frozen=False, bounds=False, pointers=True
) -> CompiledKernel:
    """``pointers``: seed, step and numbers are on the device."""
    numbers, switches = _numbers(pointers)
    if adjusted:  # its noise scale is the number 1
        numbers["noise_scale"], switches["NOISE_SCALE_PTR"] = "fp32", False
    pointed = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types = pointed | numbers | dict(chains="i64", steps="i32", offset="i64", low="fp32", high="fp32") | types
    constants = constants | switches | dict(ADJUSTED=adjusted, CHAIN_NORM=chain_norm, FROZEN=frozen, HAS_BOUNDS=bounds)
    return _compiled(kernel, target, types, constants, num_warps=warps, num_stages=1)


def _numbers(pointers: bool, noise_scale: bool = True) -> tuple[dict[str, str], dict[str, bool]]:
    """The types of a launch's numbers, and the kernels' switches that say where they are."""
    kinds = dict(threshold="fp32", step_size="fp32", noise_scale="fp32", seed="i64", step="i64")
    if not noise_scale:
        del kinds["noise_scale"]
    return (
        {name: f"*{kind}" if pointers else kind for name, kind in kinds.items()},
        {f"{name.upper()}_PTR": pointers for name in kinds},
    )


def _state_types(dtype: str, gamma: bool, mask: bool) -> dict[str, str | None]:
    """Of the step's tensors."""
    types: dict[str, str | None] = {f"{name}_ptr": f"*{dtype}" for name in ("z", "score", "out")}
    return types | dict(gamma_ptr="*fp32" if gamma else None, mask_ptr="*i1" if mask else None)


def _compiled(
    kernel, target: str, types: Mapping[str, str | None], constants: Mapping[str, Any],
    unaligned: Collection[str] = (), **options: int,
) -> CompiledKernel:  # fmt: skip
    """``types``: of the kernel's arguments; None where there is none. Those without a type are constants.
    ``unaligned``: tensors that need not start at multiples of 16 bytes; numbers always do."""
    constants = {"FAST": TARGETS[target].backend == "cuda", **constants}
    constants |= {name: None for name, kind in types.items() if kind is None}
    signature = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") and not (name.endswith("_ptr") and name in unaligned)
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=TARGETS[target],
        options={"enable_fp_fusion": True, **options},
    )


def disassemble(kernel: CompiledKernel) -> str:
    """SASS of a kernel compiled for an NVIDIA target, by the nvdisasm that triton brings."""
    return _inspect(kernel, "nvdisasm", "-c")


class Resources(NamedTuple):
    registers: int  #: a thread
    local_bytes: int  #: a thread's local memory, which is where registers spill
    shared_bytes: int  #: a block


def resources(kernel: CompiledKernel) -> Resources:
    """What a kernel compiled for an NVIDIA target occupies, by the cuobjdump that triton brings."""
    usage = _inspect(kernel, "cuobjdump", "-res-usage")
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], max(found["SHARED"], kernel.metadata.shared))


def _inspect(kernel: CompiledKernel, tool: str, flag: str) -> str:
    path = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", tool)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([path, flag, file.name], capture_output=True, text=True, check=True).stdout
