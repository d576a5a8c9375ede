"""Compile the kernels without a GPU, in the launch configuration the operators use, and disassemble them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton
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
    kernel = step.anisotropic_step_kernel
    constants = dict(
        **{name: pointers for name in ("THRESHOLD_PTR", "STEP_SIZE_PTR", "NOISE_SCALE_PTR", "SEED_PTR", "STEP_PTR")},
        LANE=lane, HAS_GAMMA=gamma, HAS_MASK=mask, HAS_BOUNDS=bounds,
        FAST=TARGETS[target].backend == "cuda", BLOCK=step.CONFIGURATION.block,
    )  # fmt: skip
    number = "*fp32" if pointers else "fp32"
    word = "*i64" if pointers else "i64"
    types = dict(
        z_ptr=f"*{dtype}", score_ptr=f"*{dtype}", out_ptr=f"*{dtype}", n="i64", first_quad="i64",
        threshold=number, step_size=number, noise_scale=number, seed=word, step=word, low="fp32", high="fp32",
    )  # fmt: skip
    if gamma:
        types["gamma_ptr"] = "*fp32"
    if mask:
        types["mask_ptr"] = "*i1"
    constants |= {name: None for name in ("gamma_ptr", "mask_ptr") if name not in types}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") and name != "mask_ptr"  # as the kernel's decorator says
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=TARGETS[target],
        options={"num_warps": step.CONFIGURATION.warps, "enable_fp_fusion": True},
    )


def compile_rows(
    target: str, dtype: str = "fp32", *, norm="element", channels=1, size=3072, statistics=False,
    gamma=False, mask=False, bounds=False, pointers=True, aligned=True,
) -> CompiledKernel:  # fmt: skip
    """The step with a shared norm or statistics, for chains of (channels, size), as `rows.launch` launches it.

    norm: "channel"; or "element", "chain" with channels 1. ``aligned``: the tensors start at multiples of 16 bytes.
    """
    kernel = step_rows.rows_kernel
    tile = step_rows.tile_of(channels, size, norm)
    constants = dict(
        **{name: pointers for name in ("THRESHOLD_PTR", "STEP_SIZE_PTR", "NOISE_SCALE_PTR", "SEED_PTR", "STEP_PTR")},
        HAS_GAMMA=gamma, HAS_MASK=mask, HAS_BOUNDS=bounds, STATISTICS=statistics,
        FAST=TARGETS[target].backend == "cuda", **step_rows.constants(tile, size, norm),
    )  # fmt: skip
    number, word = ("*fp32", "*i64") if pointers else ("fp32", "i64")
    types = dict(
        z_ptr=f"*{dtype}", score_ptr=f"*{dtype}", out_ptr=f"*{dtype}", gamma_ptr="*fp32" if gamma else None,
        mask_ptr="*i1" if mask else None, chains="i64", channels="i64", units="i64", first="i64",
        threshold=number, step_size=number, noise_scale=number, seed=word, step=word, low="fp32", high="fp32",
    )  # fmt: skip
    types |= {f"{name}_ptr": "*fp32" if statistics else None for name in ("gamma_mean", "score_rms", "clip_fraction")}
    constants |= {name: None for name, kind in types.items() if kind is None}
    signature = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") and (aligned or name in ("threshold", "step_size", "noise_scale"))
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=TARGETS[target],
        options={"num_warps": tile.num_warps, "enable_fp_fusion": True},
    )


def compile_metropolis(
    target: str, dtype: str = "fp32", *, norm="element", channels=1, size=3072, mask=False, pointers=True, aligned=True
) -> CompiledKernel:
    """Accept or reject and propose, for chains of (channels, size), as `metropolis.launch` launches it."""
    kernel = metropolis.metropolis_kernel
    tile = metropolis.tile_of(channels, size, norm)
    constants = dict(
        **{name: pointers for name in ("THRESHOLD_PTR", "STEP_SIZE_PTR", "SEED_PTR", "STEP_PTR")},
        HAS_MASK=mask, FAST=TARGETS[target].backend == "cuda", **step_rows.constants(tile, size, norm),
    )  # fmt: skip
    number, word = ("*fp32", "*i64") if pointers else ("fp32", "i64")
    states = ("z", "score", "proposal", "proposal_score", "z_out", "score_out", "next")
    types = {f"{name}_ptr": f"*{dtype}" for name in states}
    types |= {f"{name}_ptr": "*fp32" for name in ("energy", "proposal_energy", "energy_out", "acceptance")}
    types |= dict(
        mask_ptr="*i1" if mask else None, chains="i64", channels="i64", units="i64", offset="i64",
        threshold=number, step_size=number, seed=word, step=word,
    )  # fmt: skip
    constants |= {name: None for name, kind in types.items() if kind is None}
    signature = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") and (aligned or name in ("threshold", "step_size"))
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=TARGETS[target],
        options={"num_warps": tile.num_warps, "enable_fp_fusion": True},
    )


def compile_mixture_trajectory(
    target: str, *, dim=2, components=8, adjusted=False, chain_norm=False, frozen=False, bounds=False, pointers=True
) -> CompiledKernel:
    """The whole-chain kernel of a Gaussian mixture, seed and step and numbers on the device where ``pointers``."""
    constants = mixture.mixture_constants(dim, components, adjusted)
    return _compile_trajectory(
        mixture.mixture_kernel, target, constants, 1, adjusted, chain_norm, frozen, bounds, pointers,
        components_="i32",
    )  # fmt: skip


def compile_mlp_trajectory(
    target: str, *, dim=2, width=64, depth=2, features=0, chains=1024, silu=True, adjusted=False,
    chain_norm=False, frozen=False, bounds=False, pointers=True, shared=None,
) -> CompiledKernel:  # fmt: skip
    """The whole-chain kernel of an MLP energy as launched for that many chains on that target, given ``shared`` bytes
    of shared memory, or all of the target's."""
    constants, warps = mlp.mlp_constants(dim, width, depth, features, chains, shared or SHARED_MEMORY[target])
    absent = [f"{kind}{layer}_ptr" for layer in range(depth, 3) for kind in "wb"]
    constants |= dict(SILU=silu, **{name: None for name in absent})
    if not features:
        constants["projections_ptr"] = None
    return _compile_trajectory(
        mlp.mlp_kernel, target, constants, warps, adjusted, chain_norm, frozen, bounds, pointers,
        confinement="fp32", leak="fp32",
    )  # fmt: skip


def _compile_trajectory(kernel, target, constants, warps, adjusted, chain_norm, frozen, bounds, pointers, **types):
    number, word = ("*fp32", "*i64") if pointers else ("fp32", "i64")
    scale = "fp32" if adjusted else number  # always the number 1
    types |= dict(
        threshold=number, step_size=number, noise_scale=scale, seed=word, step=word,
        chains="i64", steps="i32", offset="i64", low="fp32", high="fp32",
    )  # fmt: skip
    constants = constants | dict(ADJUSTED=adjusted, CHAIN_NORM=chain_norm, FROZEN=frozen, HAS_BOUNDS=bounds)
    constants |= {name: pointers for name in ("THRESHOLD_PTR", "STEP_SIZE_PTR", "SEED_PTR", "STEP_PTR")}
    constants |= dict(NOISE_SCALE_PTR=pointers and not adjusted, FAST=TARGETS[target].backend == "cuda")
    pointed = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types = {name: kind for name, kind in (pointed | types).items() if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=TARGETS[target],
        options={"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True},
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
    import triton.backends.nvidia

    path = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", tool)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([path, flag, file.name], capture_output=True, text=True, check=True).stdout
