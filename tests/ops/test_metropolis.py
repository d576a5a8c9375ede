"""The Metropolis operator's face: checks, registration, compilation, and its CPU path."""

import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import oracle
from fastanila import noise, ops
from fastanila.ops import metropolis, metropolis_step, reference


def given(shape=(6, 3), dtype=torch.float32, seed=0):
    """(z, score, energy, proposal, proposal_score, proposal_energy) that belong to no energy."""
    generator = torch.Generator().manual_seed(seed)
    z, score, moved, change = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    energy, proposal_energy = torch.randn((2, shape[0]), generator=generator)
    return z, 3 * score, energy, z + moved / 2, 3 * score + change, proposal_energy


def numpy_of(tensors):
    return [t.double().numpy() for t in tensors]


# -------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("threshold", [0.5, 3.0, math.inf])
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 4), (5, 3, 2, 2)], ids=str)
def test_the_definition_equals_the_formula(norm, threshold, shape):
    if norm == "channel" and len(shape) == 1:
        pytest.skip("no channels")
    tensors = [t.double() for t in given(shape)]
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=generator) < 0.7
    for chosen in (None, mask):
        settings = dict(step_size=0.4, norm=norm, mask=chosen)
        want = oracle.log_accept(*tensors, threshold, **settings)
        np.testing.assert_allclose(reference.log_accept(*tensors, threshold, **settings), want, rtol=1e-10, atol=1e-10)
        made = reference.metropolis_step(
            *tensors, threshold, **settings, uniform=torch.full((5,), 0.5), noise=torch.zeros(shape)
        )
        np.testing.assert_allclose(made.acceptance, np.minimum(1, np.exp(want)), rtol=1e-10)
        assert torch.equal(made.energy, torch.where(torch.tensor(want) > math.log(0.5), tensors[5], tensors[2]))


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_face_equals_the_formula(dtype, norm):
    tensors = given((40, 3, 4), dtype)
    seed, step, offset = (1 << 64) - 9, (1 << 35) + 1, 7
    settings = dict(step_size=0.4, norm=norm)
    log_q = oracle.log_accept(*numpy_of(tensors[:5]), tensors[2].numpy(), 2.0, **settings)
    tensors = *tensors[:5], tensors[2] + torch.tensor(log_q).float() + tensors[5].abs()
    out = metropolis_step(*tensors, 2.0, **settings, seed=seed, step=step, offset=offset)
    assert [t.dtype for t in out] == [dtype, dtype, torch.float32, dtype, torch.float32]
    assert all(t.is_contiguous() for t in out)

    alpha = np.minimum(1, np.exp(oracle.log_accept(*numpy_of(tensors), 2.0, **settings)))
    np.testing.assert_allclose(out.acceptance, alpha, rtol=0, atol=5e-5)
    u = oracle.uniforms(np.arange(offset, offset + 40, dtype=object), seed, step, stream=1)
    moved = u < alpha
    assert np.abs(u - alpha).min() > 5e-5 and 0 < moved.sum() < 40
    pick = torch.tensor(moved)
    assert torch.equal(out.energy, torch.where(pick, tensors[5], tensors[2]))
    for got, new, old in ((out.z, tensors[3], tensors[0]), (out.score, tensors[4], tensors[1])):
        assert torch.equal(got, torch.where(pick[:, None, None], new, old))
    xi = oracle.normals(np.arange(offset * 12, (offset + 40) * 12, dtype=object), seed, step + 1).reshape(40, 3, 4)
    want = oracle.step(out.z.double(), out.score.double(), 2.0, xi, **settings)
    tolerance = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    np.testing.assert_allclose(out.proposal.double(), want, rtol=tolerance, atol=tolerance)


def test_the_next_proposal_is_the_step_of_the_next_transition():
    tensors = given()
    mask = torch.tensor([True, False, True])
    out = metropolis_step(*tensors, 1.5, step_size=0.2, seed=3, step=4, offset=2, mask=mask)
    want = ops.anisotropic_step(out.z, out.score, 1.5, step_size=0.2, seed=3, step=5, offset=2, mask=mask)
    assert torch.equal(out.proposal, want)


def test_a_chain_alone_equals_the_same_chain_in_a_batch():
    tensors = given((9, 3))
    whole = metropolis_step(*tensors, 1.0, seed=4, step=5)
    for i in range(9):
        alone = metropolis_step(*(t[i : i + 1] for t in tensors), 1.0, seed=4, step=5, offset=i)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, whole, strict=True))


def test_the_results_are_new_and_detached():
    tensors = [t.requires_grad_() for t in given()]
    out = metropolis_step(*tensors, 1.0, seed=0, step=0)
    assert not any(t.requires_grad for t in out)
    addresses = {t.data_ptr() for t in tensors}
    assert len({t.data_ptr() for t in out} - addresses) == 5


@pytest.mark.parametrize("norm", ["element", "chain"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)], ids=str)
def test_empty(shape, norm):
    z, energy = torch.zeros(shape), torch.zeros(shape[0])
    out = metropolis_step(z, z, energy, z, z, energy - 1, 1.0, norm=norm, seed=0, step=0)
    assert out.z.shape == out.score.shape == out.proposal.shape == z.shape
    assert out.acceptance.tolist() == [1.0] * shape[0] and out.energy.tolist() == [-1.0] * shape[0]


# ------------------------------------------------------------------------------------- registration and compilation


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("named", ["numbers", "tensors"])
def test_opcheck(norm, named):
    seed, step, step_size, mask = 3, 4, 0.3, None
    if named == "tensors":
        seed, step, step_size, mask = *map(torch.tensor, (seed, step, step_size)), torch.tensor([True, False, True])
    tensors, rest = metropolis.prepare(*given(), 1.5, step_size, norm, seed, step, 0, mask)
    torch.library.opcheck(torch.ops.fastanila.metropolis_step.default, (*tensors, *rest))
    out = torch.ops.fastanila.metropolis_step(*tensors, *rest)
    want = metropolis_step(*given(), 1.5, step_size=0.3, norm=norm, seed=3, step=4, mask=mask)
    assert all(map(torch.equal, out, want))


def chain(z, threshold, step_size, seed, step):
    tensors = z, -z, z.square().sum(1) / 2, z + 0.5, -z - 0.5, (z + 0.5).square().sum(1) / 2
    return metropolis_step(*tensors, threshold, step_size=step_size, seed=seed, step=step)


# what Inductor makes of it takes tens of seconds; every run compiles it in the trainer
backends = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


@backends
def test_changing_scalars_do_not_recompile(backend):
    counter = CompileCounter()
    counting = torch.compile(chain, fullgraph=True, backend=counter)
    fast = torch.compile(chain, fullgraph=True, backend=backend)
    z = given()[0]
    for i in range(1, 6):
        numbers = torch.tensor(0.3 * i), torch.tensor(0.1 * i), torch.tensor(i - (1 << 62)), torch.tensor(i << 33)
        torch.testing.assert_close(tuple(fast(z, *numbers)), tuple(chain(z, *numbers)), rtol=1e-5, atol=1e-5)
        counting(z, *numbers)
    assert counter.frame_count == 1


@backends
def test_numbers_compile_too(backend):
    z = given()[0]
    compiled = torch.compile(chain, fullgraph=True, backend=backend)
    for threshold, step in ((0.5, 0), (2.0, 1), (math.inf, (1 << 33) + 1)):
        arguments = z, threshold, 0.2, (1 << 64) - 1, step
        torch.testing.assert_close(tuple(compiled(*arguments)), tuple(chain(*arguments)), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ errors

Z, SCORE, ENERGY, PROPOSAL, PROPOSAL_SCORE, PROPOSAL_ENERGY = given()
ERRORS = {
    "z float64": (dict(z=Z.double()), TypeError, "z must be float32, bfloat16 or float16, got torch.float64"),
    "z type": (dict(z=Z.numpy()), TypeError, "z must be a tensor, got ndarray"),
    "z 0-dim": (dict(z=Z[0, 0]), ValueError, "z must have a dimension of chains"),
    "score shape": (dict(score=SCORE[:, :2]), ValueError, r"^score must have z's shape \(6, 3\), got \(6, 2\)"),
    "proposal dtype": (dict(proposal=PROPOSAL.half()), TypeError, "^proposal must have z's dtype torch.float32, got"),
    "proposal_score device": (
        dict(proposal_score=PROPOSAL_SCORE.to("meta")), ValueError, "^proposal_score must be on z's device cpu, got",
    ),
    "energy shape": (dict(energy=ENERGY[:, None]), ValueError, r"^energy must have shape \(6,\), .* got \(6, 1\)"),
    "energy dtype": (dict(energy=ENERGY.double()), TypeError, "^energy must be float32, got torch.float64"),
    "proposal_energy type": (dict(proposal_energy=1.0), TypeError, "^proposal_energy must be a tensor, got float"),
    "proposal_energy device": (
        dict(proposal_energy=ENERGY.to("meta")), ValueError, "^proposal_energy must be on z's device cpu, got meta",
    ),
    "threshold": (dict(threshold=0.0), ValueError, "threshold must be positive or inf, got 0.0"),
    "threshold None": (dict(threshold=None), TypeError, "threshold must be a number or a 0-dim floating tensor"),
    "step_size": (dict(step_size=math.inf), ValueError, "step_size must be positive and finite, got inf"),
    "norm": (dict(norm="pixel"), ValueError, "norm must be one of element, channel, chain, got 'pixel'"),
    "seed": (dict(seed=None), TypeError, "seed must be an int or a 0-dim int64 tensor, got NoneType"),
    "step": (dict(step=1.0), TypeError, "step must be an int or a 0-dim int64 tensor, got float"),
    "step < 0": (dict(step=-1), ValueError, "step must be at least 0 and leave room for 2 steps .* got -1"),
    "last step": (dict(step=noise.MAX_STEP - 1), ValueError, "step must .* leave room for 2 steps below 2"),
    "offset": (dict(offset=-1), ValueError, "offset must be at least 0, got -1"),
    "mask dtype": (dict(mask=Z), TypeError, "mask must be a bool tensor, got torch.float32"),
    "mask shape": (dict(mask=Z[:4] > 0), ValueError, "mask must broadcast to z's shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_arguments_are_named(name):
    change, error, message = ERRORS[name]
    arguments = dict(
        z=Z, score=SCORE, energy=ENERGY, proposal=PROPOSAL, proposal_score=PROPOSAL_SCORE,
        proposal_energy=PROPOSAL_ENERGY, threshold=1.0, seed=0, step=0,
    )  # fmt: skip
    with pytest.raises(error, match=message):
        metropolis_step(**(arguments | change))


def test_the_last_step_and_numpy_numbers_are_taken():
    tensors = given()
    out = metropolis_step(*tensors, np.float32(1.5), seed=np.int64(3), step=np.int64(noise.MAX_STEP - 2))
    want = metropolis_step(*tensors, 1.5, seed=3, step=noise.MAX_STEP - 2)
    assert all(map(torch.equal, out, want))
