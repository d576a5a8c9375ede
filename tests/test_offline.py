"""Every kernel compiles for every target without a GPU, and its hot path is what it was written to be."""

import pytest

triton = pytest.importorskip("triton")

from bench.offline import TARGETS, compile_step, disassemble  # noqa: E402
from fastanila import ops  # noqa: E402

pytestmark = pytest.mark.skipif(ops.INTERPRETED, reason="the interpreter replaces the compiler")

DTYPES = ("fp32", "bf16", "fp16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for_every_target(target, dtype):
    compiled = compile_step(target, dtype)
    assert compiled.asm["ttgir"]
    assert compiled.metadata.shared == 0 or target == "gfx942", "no shared memory for the per-element norm"


VARIANTS = {
    "straddling": dict(lane=1),
    "gamma": dict(gamma=True),
    "mask": dict(mask=True),
    "bounds": dict(bounds=True),
    "numbers": dict(pointers=False),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_variant_compiles(target, name):
    assert compile_step(target, "fp32", **VARIANTS[name]).asm["ttgir"]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accesses_are_sixteen_bytes_and_nothing_spills(target, dtype):
    sass = disassemble(compile_step(target, dtype))
    threads_elements = 16 * {"fp32": 4, "bf16": 2, "fp16": 2}[dtype]  # bytes a thread moves
    assert sass.count("LDG.E.128") == 2 * threads_elements // 16
    assert sass.count("STG.E.128") == threads_elements // 16
    opcodes = {word.split(".")[0] for word in sass.split()}
    assert "STG" in opcodes and not opcodes & {"LDL", "STL", "BAR"}


def test_addresses_are_64_bit():
    """Offsets of element indices beyond 2^31: the block's first element is a 64-bit product."""
    ttir = compile_step("sm_90", "fp32").asm["ttir"]
    assert "arith.extsi" in ttir and "tensor<2048xi64>" in ttir
    assert "!tt.ptr<f32>>, tensor<2048xi64>" in ttir and "!tt.ptr<f32>>, tensor<2048xi32>" not in ttir
