"""Compile the kernels without a GPU, in the launch configuration the operators use, and disassemble them."""

from __future__ import annotations

import os
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fastanila.kernels import anisotropic

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compile_step(
    target: str, dtype: str = "fp32", *, lane=0, gamma=False, mask=False, bounds=False, pointers=True
) -> CompiledKernel:
    """The anisotropic step for a target of TARGETS; ``dtype`` is fp32, bf16 or fp16.

    ``pointers``: threshold, step size, noise scale, seed and step come as 0-dim tensors, as a sampler passes them.
    """
    kernel = anisotropic.anisotropic_step_kernel
    constants = dict(
        **{name: pointers for name in ("THRESHOLD_PTR", "STEP_SIZE_PTR", "NOISE_SCALE_PTR", "SEED_PTR", "STEP_PTR")},
        LANE=lane, HAS_GAMMA=gamma, HAS_MASK=mask, HAS_BOUNDS=bounds,
        FAST=TARGETS[target].backend == "cuda", BLOCK=anisotropic.BLOCK,
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
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=TARGETS[target],
        options={"num_warps": anisotropic.NUM_WARPS, "enable_fp_fusion": True},
    )


def disassemble(kernel: CompiledKernel) -> str:
    """SASS of a kernel compiled for an NVIDIA target, by the nvdisasm that triton brings."""
    import triton.backends.nvidia

    tool = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
