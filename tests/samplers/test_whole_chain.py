"""The whole-chain kernels compile for every target without a GPU, stay in registers, and refuse what they cannot do."""

import gc
import math
import re

import pytest
import torch

triton = pytest.importorskip("triton")

from bench.offline import (  # noqa: E402
    SHARED_MEMORY,
    TARGETS,
    compile_mixture_trajectory,
    compile_mlp_trajectory,
    disassemble,
    resources,
)
from cases import (  # noqa: E402
    ADJUSTED_MIXTURES,
    ADJUSTED_NETWORKS,
    BATCHES,
    DIMS,
    MIXTURES,
    NETWORKS,
    SAMPLERS,
    SHARED_MEMORIES,
    SLOW_ADJUSTED_MIXTURES,
    SLOW_ADJUSTED_NETWORKS,
    SQUEEZED,
    one_in,
    with_slow,
)
from fastanila import ops  # noqa: E402
from fastanila.kernels import mlp  # noqa: E402
from fastanila.kernels.mixture import mixture_constants  # noqa: E402
from fastanila.kernels.mlp import mlp_constants  # noqa: E402
from fastanila.models import MLP, GaussianMixture  # noqa: E402
from fastanila.ops import dispatch  # noqa: E402
from fastanila.samplers import whole_chain  # noqa: E402

pytestmark = pytest.mark.skipif(ops.INTERPRETED, reason="the interpreter replaces the compiler")


def opcodes(compiled) -> set[str]:
    return {word.split(".")[0] for word in disassemble(compiled).split()}


SPILLS = {"LDL", "STL"}
TENSOR_CORES = {"HMMA", "QGMMA", "HGMMA", "DMMA", "UTCHMMA", "UTCQMMA"}


def spilled(compiled) -> int:
    """Bytes of a thread's local memory, or registers that it spills on AMD."""
    if "amdgcn" in compiled.asm:
        return sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])))
    return resources(compiled).local_bytes


@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_a_mixture_compiles_for_every_target(target, adjusted):
    compiled = compile_mixture_trajectory(target, adjusted=adjusted)
    assert compiled.asm["ttgir"] and compiled.metadata.shared == 0, "a chain a thread exchanges nothing"
    assert spilled(compiled) == 0


@one_in(
    2,
    target=["sm_90", "gfx942"],
    options=[
        dict(chain_norm=True), dict(frozen=True), dict(bounds=True), dict(pointers=False),
        dict(adjusted=True, chain_norm=True), dict(adjusted=True, pointers=False),
    ],
)  # fmt: skip
def test_every_variant_of_a_mixture_compiles(target, options):
    assert compile_mixture_trajectory(target, dim=3, components=40, **options).asm["ttgir"]


@pytest.mark.parametrize(
    ("dim", "components"), with_slow([(2, 25), (3, 5)], [(1, 34), (2, 8), (4, 17), (8, 10), (2, 1000)])
)
def test_a_mixture_stays_in_registers(dim, components):
    found = opcodes(compile_mixture_trajectory("sm_90", dim=dim, components=components))
    assert "MUFU" in found and not found & (SPILLS | {"BAR"})


@one_in(4, chain_norm=[False, True], sizes=[(1, 33), (2, 24), (3, 14), (8, 7), (8, 8)])
def test_an_adjusted_mixture_stays_in_registers(sizes, chain_norm):
    """At the most components that are held, and beyond."""
    dim, components = sizes
    compiled = compile_mixture_trajectory("sm_90", dim=dim, components=components, adjusted=True, chain_norm=chain_norm)
    assert not opcodes(compiled) & (SPILLS | {"BAR"})
    assert mixture_constants(dim, components, True)["HELD"] == ((dim, components) != (8, 8))
    assert not mixture_constants(dim, components + 1, True)["HELD"]


@one_in(4, adjusted=[False, True], features=[0, 64], target=list(TARGETS))
def test_a_network_compiles_for_every_target(target, features, adjusted):
    compiled = compile_mlp_trajectory(target, features=features, chains=512, adjusted=adjusted)
    assert 0 < compiled.metadata.shared <= SHARED_MEMORY[target]
    assert compiled.metadata.num_warps == 4
    if stray(target, features, adjusted):
        assert spilled(compiled) == 8 and resources(compiled).registers < 128
        assert not opcodes(compiled) & TENSOR_CORES
        return
    assert spilled(compiled) == 0
    if TARGETS[target].backend == "cuda":
        assert not opcodes(compiled) & (SPILLS | TENSOR_CORES)


def stray(target: str, features: int, adjusted: bool) -> bool:
    """Where the ptxas of triton 3.8 keeps one 8-byte value in local memory with 80 of 255 registers in use; that of
    3.6 does not."""
    cases = {("sm_89", 0, True), ("sm_90", 0, True)}
    return (target, features, adjusted) in cases and triton.__version__.startswith("3.8.")


@one_in(
    4,
    target=["sm_90", "gfx942"],
    options=[
        dict(chain_norm=True), dict(frozen=True), dict(bounds=True), dict(pointers=False), dict(silu=False),
        dict(adjusted=True, chain_norm=True), dict(adjusted=True, pointers=False, silu=False),
    ],
)  # fmt: skip
def test_every_variant_of_a_network_compiles(target, options):
    assert compile_mlp_trajectory(target, dim=3, width=20, depth=3, features=3, chains=9, **options).asm["ttgir"]


@one_in(7, width=[64, 128], features=[0, 64], dim=[2, 8], chains=[64, 1024, 16384], adjusted=[False, True])
def test_a_network_stays_on_chip(width, features, dim, chains, adjusted):
    """No spills, and products in full float32: not one instruction of a tensor core."""
    compiled = compile_mlp_trajectory(
        "sm_90", dim=dim, width=width, features=features, chains=chains, adjusted=adjusted
    )
    words = [word.split(".")[0] for word in disassemble(compiled).split()]
    assert "FFMA" in words and not set(words) & TENSOR_CORES
    # ptxas may give up a register or four for one more program a multiprocessor
    assert sum(word in SPILLS for word in words) <= (8 if dim == 8 else 0)
    assert compiled.metadata.shared <= SHARED_MEMORY["sm_90"]
    held = mlp_constants(dim, width, 2, features, chains, SHARED_MEMORY["sm_90"])[0]["HELD"]
    assert held == {(64, 0): 2, (64, 64): 6, (128, 0): 2, (128, 64): 3}[width, features]


@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        ("sm_90", dict(width=128, depth=3, features=128, dim=8)),
        pytest.param("sm_89", dict(width=128, depth=2), marks=pytest.mark.slow),
        pytest.param("sm_80", dict(width=128, depth=2, features=64), marks=pytest.mark.slow),
        ("gfx942", dict(width=64, depth=3, features=64)),
    ],
    ids=str,
)
def test_networks_too_large_for_shared_memory_leave_matrices_out(target, sizes):
    compiled = compile_mlp_trajectory(target, **sizes)
    assert compiled.metadata.shared <= SHARED_MEMORY[target]
    shape = (sizes.get("dim", 2), sizes["width"], sizes["depth"], sizes.get("features", 0), 1024)
    matrices = 2 * (sizes["depth"] - 1) + 4 * bool(sizes.get("features"))
    assert mlp_constants(*shape, SHARED_MEMORY[target])[0]["HELD"] < matrices


# ------------------------------------------------------------------------- what the parity tests run, compiled for it


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "components"), sorted({*MIXTURES, (5, 3)}))
def test_the_mixtures_of_the_parity_tests_compile(dim, components):
    assert not opcodes(compile_mixture_trajectory("sm_90", dim=dim, components=components, pointers=False)) & SPILLS


@pytest.mark.slow
@pytest.mark.parametrize(("count", "rows"), BATCHES)
@pytest.mark.parametrize(("dim", "width", "depth", "features", "activation"), NETWORKS)
def test_the_networks_of_the_parity_tests_compile(monkeypatch, dim, width, depth, features, activation, count, rows):
    monkeypatch.setattr(mlp, "PROGRAMS", -(-count // rows))
    compiled = compile_mlp_trajectory(
        "sm_90", dim=dim, width=width, depth=depth, features=features, chains=count, silu=activation == "silu",
        pointers=False,
    )  # fmt: skip
    assert compiled.metadata.shared <= SHARED_MEMORY["sm_90"] and not opcodes(compiled) & TENSOR_CORES


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "components", "norm"), [*ADJUSTED_MIXTURES, *SLOW_ADJUSTED_MIXTURES])
def test_the_adjusted_mixtures_of_the_parity_tests_compile(dim, components, norm):
    options = dict(adjusted=True, chain_norm=norm != "element", pointers=False)
    assert spilled(compile_mixture_trajectory("sm_90", dim=dim, components=components, **options)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "width", "depth", "features", "activation", "norm", "count", "rows"),
    [*ADJUSTED_NETWORKS, *SLOW_ADJUSTED_NETWORKS],
)
def test_the_adjusted_networks_of_the_parity_tests_compile(
    monkeypatch, dim, width, depth, features, activation, norm, count, rows
):
    monkeypatch.setattr(mlp, "PROGRAMS", -(-count // rows))
    compiled = compile_mlp_trajectory(
        "sm_90", dim=dim, width=width, depth=depth, features=features, chains=count, silu=activation == "silu",
        adjusted=True, chain_norm=norm != "element", pointers=False,
    )  # fmt: skip
    assert compiled.metadata.shared <= SHARED_MEMORY["sm_90"] and not opcodes(compiled) & TENSOR_CORES


@pytest.mark.slow
@pytest.mark.parametrize("dim", sorted({*DIMS} - {2, 3, 8}))  # which the networks above have
def test_the_networks_of_every_dimension_compile(monkeypatch, dim):
    monkeypatch.setattr(mlp, "PROGRAMS", 2)
    assert opcodes(compile_mlp_trajectory("sm_90", dim=dim, width=20, chains=3, pointers=False))


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "refresh", "bounds"), SAMPLERS)
def test_the_samplers_of_the_parity_tests_compile(monkeypatch, norm, refresh, bounds):
    monkeypatch.setattr(mlp, "PROGRAMS", 2)
    options = dict(chain_norm=norm != "element", frozen=refresh == "update", bounds=bounds is not None, pointers=False)
    assert opcodes(compile_mixture_trajectory("sm_90", dim=3, components=3, **options))
    assert opcodes(compile_mlp_trajectory("sm_90", dim=3, width=20, chains=5, **options))


@pytest.mark.slow
@pytest.mark.parametrize("shared", SHARED_MEMORIES[::2])
def test_a_network_squeezed_compiles(shared):
    dim, width, depth, features = SQUEEZED
    compiled = compile_mlp_trajectory(
        "sm_90", dim=dim, width=width, depth=depth, features=features, chains=3, pointers=False, shared=shared
    )
    assert compiled.metadata.shared <= SHARED_MEMORY["sm_90"] and opcodes(compiled)


def test_sizes_follow_from_shapes():
    def rows(chains, **sizes):
        sizes = dict(dim=2, width=64, depth=2, features=0, shared=SHARED_MEMORY["sm_90"]) | sizes
        return mlp_constants(chains=chains, **sizes)[0]["ROWS"]

    assert [rows(n) for n in (1, 64, 132, 133, 1024, 1 << 20)] == [1, 1, 1, 2, 8, 16]
    assert rows(1 << 20, features=64) == 8 and rows(1 << 20, width=128, features=64) == 4
    assert mlp_constants(2, 128, 2, 0, 64, SHARED_MEMORY["gfx942"]) is None


def test_wide_layers_have_more_warps():
    def warps(chains, width=64):
        return mlp_constants(2, width, 2, 64, chains, SHARED_MEMORY["sm_90"])[1]

    assert [warps(64), warps(512), warps(512, 128)] == [4, 4, 8]


# ------------------------------------------------------------------------------------------------------------ errors

Z = torch.zeros(3, 2)
GOOD = dict(threshold=1.0, step_size=0.1, noise_scale=1.0, seed=0, step=0, steps=1)
ERRORS = {
    "threshold": (dict(threshold=0.0), ValueError, "threshold must be positive or inf, got 0.0"),
    "threshold vector": (dict(threshold=torch.ones(3)), TypeError, "threshold must be a number or a 0-dim floating"),
    "step_size": (dict(step_size=math.inf), ValueError, "step_size must be positive and finite, got inf"),
    "noise_scale": (dict(noise_scale=-1.0), ValueError, "noise_scale must be at least 0 and finite, got -1.0"),
    "norm": (dict(norm="pixel"), ValueError, "norm must be one of element, channel, chain, got 'pixel'"),
    "refresh": (dict(refresh="never"), ValueError, "refresh must be one of transition, update, got 'never'"),
    "bounds": (dict(bounds=(1, -1)), ValueError, "bounds must be a pair with low < high"),
    "seed": (dict(seed=0.5), TypeError, "seed must be an int or a 0-dim int64 tensor, got float"),
    "step": (dict(step=-1), ValueError, "step must be at least 0 and leave room for 1 steps below 2"),
    "last step": (dict(step=(1 << 56) - 4, steps=5), ValueError, "leave room for 5 steps"),
    "step device": (dict(step=torch.zeros((), dtype=torch.int64, device="meta")), ValueError, "step must be on z's"),
    "adjusted, noise_scale": (
        dict(adjusted=True, noise_scale=0.9),
        ValueError,
        "noise_scale must be 1, a number, where adjusted is True, got 0.9",
    ),
    "adjusted, bounds": (
        dict(adjusted=True, bounds=(-1, 1)),
        ValueError,
        "bounds must be None where adjusted is True, got",
    ),
    "adjusted, refresh": (
        dict(adjusted=True, refresh="update"),
        ValueError,
        "refresh must be 'transition' where adjusted is True, got 'upd",
    ),
    "steps": (dict(steps=0), ValueError, "steps must be an integer of at least 1, got 0"),
    "offset": (dict(offset=-1), ValueError, "offset must be an integer of at least 0, got -1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_arguments_are_named(monkeypatch, name):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)  # as on a device with kernels; the checks come before any launch
    change, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        whole_chain.run(GaussianMixture(torch.zeros(1, 2)), Z, **GOOD | change)


def test_without_a_kernel_nothing_is_supported():
    """A plain CPU: `run` says so, and does not fall back."""
    for energy in (GaussianMixture(torch.zeros(1, 2)), MLP(2)):
        assert not whole_chain.supports(energy, Z)
        assert whole_chain.refusal(energy, Z).startswith("no Triton kernel runs on z's device cpu")
        with pytest.raises(ValueError, match="but no Triton kernel runs on z's device cpu"):
            whole_chain.run(energy, Z, **GOOD)


# ----------------------------------------------------------------------------------- what is known of an energy's parts


def changes():
    def weight(energy):
        energy.layers[2].weight = torch.nn.Parameter(torch.ones(8, 8))

    def data(energy):
        energy.layers[0].weight.data = torch.ones(8, 3)

    def head(energy):
        energy.head = torch.nn.Linear(8, 1)

    def slope(energy):
        for activation in (energy.layers[1], energy.layers[3]):
            activation.negative_slope = 0.5

    return [weight, data, head, slope]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_an_energys_parts_are_looked_up_anew_when_one_is_exchanged(change):
    energy = MLP(3, 8, activation="leaky-relu")
    before = whole_chain._parts(energy)
    assert whole_chain._parts(energy) is before
    with torch.no_grad():
        energy.layers[0].weight.mul_(2)  # in place: the parts share its memory
    assert whole_chain._parts(energy) is before and torch.equal(before.tensors[0][0], energy.layers[0].weight)
    change(energy)
    after = whole_chain._parts(energy)
    assert after is not before and after.unfit is None
    assert after.leak == energy.layers[1].negative_slope
    weights = [energy.layers[0].weight, energy.layers[2].weight, energy.head.weight]
    assert [t.data_ptr() for t in (*after.tensors[0], after.tensors[2])] == [w.data_ptr() for w in weights]


def test_an_energy_that_no_longer_fits_is_noticed():
    energy = MLP(3, 8)
    assert whole_chain._parts(energy).unfit is None
    hook = energy.layers[0].register_forward_hook(lambda *arguments: None)
    assert whole_chain._parts(energy).unfit == "the energy has forward hooks"
    hook.remove()
    assert whole_chain._parts(energy).unfit is None
    energy.double()
    assert "float32" in whole_chain._parts(energy).unfit


def test_an_energy_and_what_is_known_of_it_end_together():
    known = len(whole_chain._known)
    energies = [MLP(2, 8), GaussianMixture(torch.eye(2))]
    for energy in energies:
        whole_chain._parts(energy)
    assert len(whole_chain._known) == known + 2
    del energy, energies
    gc.collect()
    assert len(whole_chain._known) == known


def test_a_launchs_sizes_are_the_callers_own():
    """They are kept for the next launch, which must not see what a caller added."""
    for sizes in (lambda: mixture_constants(2, 3), lambda: mlp_constants(2, 64, 2, 0, 512, SHARED_MEMORY["sm_90"])[0]):
        mine = sizes()
        before = dict(mine)
        mine["MORE"] = 1
        assert sizes() == before
