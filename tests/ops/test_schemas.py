"""The operators' signatures: graphs that were exported call them by these."""

import pytest
import torch

import fastanila.samplers  # noqa: F401 (registers those of whole chains)
from fastanila.ops.schemas import chosen

NUMBERS = "float threshold, Tensor? threshold_t, float step_size, Tensor? step_size_t, "
SCALE = "float noise_scale, Tensor? noise_scale_t, "
NAMED = "SymInt seed, Tensor? seed_t, SymInt step, Tensor? step_t, "
STEP = f"Tensor score, {NUMBERS}{SCALE}str norm, {NAMED}SymInt offset, Tensor? gamma, Tensor? mask, float[]? bounds"
CHAIN = (
    f"{NUMBERS}{SCALE}{NAMED}SymInt steps, SymInt offset, bool chain_norm, bool frozen, float[]? bounds, bool adjusted"
)
SCHEMAS = {
    "anisotropic_step": f"(Tensor z, {STEP}) -> Tensor",
    "anisotropic_step_": f"(Tensor(a!) z, {STEP}) -> ()",
    "anisotropic_step_statistics": f"(Tensor z, {STEP}) -> (Tensor, Tensor)",
    "anisotropic_step_statistics_": f"(Tensor(a!) z, {STEP}) -> Tensor",
    "metropolis_step": (
        "(Tensor z, Tensor score, Tensor energy, Tensor proposal, Tensor proposal_score, Tensor proposal_energy, "
        f"{NUMBERS}str norm, {NAMED}SymInt offset, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "mixture_trajectory": f"(Tensor z, Tensor means, Tensor sd, Tensor log_scale, {CHAIN}) -> (Tensor, Tensor)",
    "mlp_trajectory": (
        "(Tensor z, Tensor[] weights, Tensor[] biases, Tensor head, Tensor head_bias, Tensor projections, "
        f"float confinement, float? leak, {CHAIN}) -> (Tensor, Tensor)"
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_signatures_stay(name):
    assert str(getattr(torch.ops.fastanila, name).default._schema) == f"fastanila::{name}{SCHEMAS[name]}"


def test_a_tensor_counts_where_there_is_one():
    tensor = torch.tensor(0.0)  # which is false
    assert chosen(1.0, tensor) is tensor and chosen(0.0, None) == 0.0
