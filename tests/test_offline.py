"""Every kernel compiles for every target without a GPU, and its hot path is what it was written to be."""

import pytest

triton = pytest.importorskip("triton")

from cases import LARGE, LAUNCHED, OUTGROWN, SHAPES, SMALL_TILES  # noqa: E402

from bench.offline import TARGETS, compile_metropolis, compile_rows, compile_step, disassemble, resources  # noqa: E402
from fastanila import ops  # noqa: E402
from fastanila.kernels import metropolis, step_rows  # noqa: E402
from fastanila.ops.reference import NORMS  # noqa: E402

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
    threads_elements = 8 * {"fp32": 4, "bf16": 2, "fp16": 2}[dtype]  # bytes a thread moves
    assert sass.count("LDG.E.128") == 2 * threads_elements // 16
    assert sass.count("STG.E.128") == threads_elements // 16
    opcodes = {word.split(".")[0] for word in sass.split()}
    assert "STG" in opcodes and not opcodes & {"LDL", "STL", "BAR"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_costs_no_exchange_between_threads(target, dtype):
    compiled = compile_step(target, dtype, mask=True)
    assert compiled.metadata.shared == 0 and "BAR" not in disassemble(compiled)


ROWS = {
    "element": dict(statistics=True),
    "channel": dict(norm="channel", channels=3, size=1024),
    "channel, statistics": dict(norm="channel", channels=3, size=1024, statistics=True),
    "chain": dict(norm="chain"),
    "chain, statistics": dict(norm="chain", statistics=True),
}


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("target", TARGETS)
def test_rows_compile_for_every_target(target, name, aligned):
    compiled = compile_rows(target, "fp32" if aligned else "bf16", aligned=aligned, **ROWS[name])
    assert compiled.asm["ttgir"]
    if target != "gfx942" and aligned:
        assert resources(compiled).local_bytes == 0


ROWS_VARIANTS = {
    "one tile, the largest": dict(norm="chain", size=8192, statistics=True),
    "two passes": dict(norm="chain", size=100_000, statistics=True),
    "a loop": dict(size=100_000, statistics=True),
    "quads straddle rows": dict(norm="chain", size=4001, statistics=True),
    "small chains": dict(norm="chain", size=2, statistics=True),
    "many channels": dict(norm="channel", channels=64, size=64, statistics=True),
    "the most channels": dict(norm="channel", channels=2048, size=64, statistics=True),
    "gamma": dict(gamma=True, statistics=True),
    "mask, bounds": dict(norm="chain", mask=True, bounds=True),
    "numbers": dict(norm="chain", pointers=False),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ROWS_VARIANTS)
def test_rows_spill_nothing(name, dtype):
    compiled = compile_rows("sm_90", dtype, **ROWS_VARIANTS[name])
    assert resources(compiled).local_bytes == 0
    if name not in ("quads straddle rows", "small chains", "the most channels"):
        sass = disassemble(compiled)
        assert "LDG.E.128" in sass and "STG.E.128" in sass


METROPOLIS = {
    "element": dict(),
    "channel": dict(norm="channel", channels=3, size=1024),
    "chain": dict(norm="chain"),
    "chain, three passes": dict(norm="chain", size=100_000),
}


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("name", METROPOLIS)
@pytest.mark.parametrize("target", TARGETS)
def test_metropolis_compiles_for_every_target(target, name, aligned):
    compiled = compile_metropolis(target, "fp32" if aligned else "bf16", aligned=aligned, **METROPOLIS[name])
    assert compiled.asm["ttgir"]
    if target != "gfx942" and aligned:
        assert resources(compiled).local_bytes == 0


METROPOLIS_VARIANTS = {
    "one tile, the largest": dict(norm="chain", size=4096),
    "two passes": dict(size=100_000),
    "quads straddle rows": dict(norm="chain", size=4001),
    "small chains": dict(norm="chain", size=2),
    "many channels": dict(norm="channel", channels=64, size=64),
    "many channels, two passes": dict(norm="channel", channels=64, size=4096),
    "mask": dict(norm="chain", mask=True),
    "mask, two passes": dict(size=100_000, mask=True),
    "numbers": dict(norm="chain", pointers=False),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METROPOLIS_VARIANTS)
def test_metropolis_spills_nothing(name, dtype):
    compiled = compile_metropolis("sm_90", dtype, **METROPOLIS_VARIANTS[name])
    # triton 3.8's ptxas spills two registers of this one, which 3.6's and 3.9's do not
    spilled = 8 if triton.__version__.startswith("3.8.") and (name, dtype) == ("quads straddle rows", "fp32") else 0
    assert resources(compiled).local_bytes <= spilled
    if name not in ("quads straddle rows", "small chains"):
        sass = disassemble(compiled)
        assert "LDG.E.128" in sass and "STG.E.128" in sass


def test_metropolis_in_one_tile_reads_its_tensors_once():
    sass = disassemble(compile_metropolis("sm_90", "fp32", norm="chain", size=4096))
    assert sass.count("LDG.E.128") == 4 * 2 and sass.count("STG.E.128") == 3 * 2  # 8 elements a thread


# ------------------------------------------------------------------------- what the parity tests run, compiled for it


STEPS = [  # beside those above
    ("fp32", dict(lane=2)),
    ("bf16", dict(lane=1)),
    ("fp16", dict(lane=3)),
    ("bf16", dict(bounds=True)),
    ("fp16", dict(bounds=True)),
    ("fp16", dict(mask=True, gamma=True)),
]


@pytest.mark.parametrize(("dtype", "options"), STEPS, ids=str)
def test_the_steps_of_the_parity_tests_compile(dtype, options):
    assert disassemble(compile_step("sm_90", dtype, pointers=False, **options))


def views(shapes, norms=NORMS) -> list[step_rows.View]:
    return sorted(
        {step_rows.view(shape, norm) for shape in shapes for norm in norms if norm != "channel" or len(shape) > 1}
    )


def kind_of(view: step_rows.View) -> tuple:
    """What two views have in common whose kernels differ in the tile's extents only."""
    tile = step_rows.tile_of(view.channels, view.size, view.norm)
    constants = step_rows.constants(tile, view.size, view.norm)
    return tuple(x for name, x in constants.items() if name not in ("ROWS", "COLS"))


ROW_VIEWS = {
    kind_of(view): view
    for view in (*views([*SHAPES, *LAUNCHED]), *(step_rows.view(shape, norm) for norm, shape in LARGE.items()))
}


@pytest.mark.parametrize("view", ROW_VIEWS.values(), ids=lambda view: "-".join(map(str, view)))
def test_the_rows_of_the_parity_tests_compile_in_half_precision(view):
    """In the other types the cases above stand for them."""
    norm, channels, size = view
    options = dict(norm=norm, channels=channels, size=size, statistics=True, pointers=False)
    assert resources(compile_rows("sm_90", "fp16", **options)).local_bytes == 0


@pytest.mark.parametrize("view", ROW_VIEWS.values(), ids=lambda view: "-".join(map(str, view)))
def test_the_metropolis_transitions_of_the_parity_tests_compile_in_half_precision(view):
    norm, channels, size = view
    compiled = compile_metropolis("sm_90", "fp16", norm=norm, channels=channels, size=size, pointers=False)
    assert resources(compiled).local_bytes == 0


@pytest.mark.parametrize("view", views(OUTGROWN), ids=lambda view: "-".join(map(str, view)))
def test_the_small_tiles_of_the_parity_tests_compile(view, monkeypatch):
    for name, elements in SMALL_TILES.items():
        monkeypatch.setattr(step_rows, name, elements)
    norm, channels, size = view
    assert size > step_rows.tile_of(channels, size, norm).cols and size > metropolis.tile_of(channels, size, norm).cols
    options = dict(norm=norm, channels=channels, size=size, pointers=False)
    assert disassemble(compile_rows("sm_90", "bf16", statistics=True, **options))
    assert disassemble(compile_metropolis("sm_90", "bf16", **options))


def test_a_chain_in_one_tile_reads_its_score_once():
    sass = disassemble(compile_rows("sm_90", "fp32", norm="chain", size=4096))
    assert sass.count("LDG.E.128") == 2 * 2 and sass.count("STG.E.128") == 2  # 8 elements a thread


def test_addresses_are_64_bit():
    """Offsets of element indices beyond 2^31: the block's first element is a 64-bit product."""
    ttir = compile_step("sm_90", "fp32").asm["ttir"]
    assert "arith.extsi" in ttir and "tensor<1024xi64>" in ttir
    assert "!tt.ptr<f32>>, tensor<1024xi64>" in ttir and "!tt.ptr<f32>>, tensor<1024xi32>" not in ttir
