"""The fused Metropolis transition against the float64 formula: on CUDA where there is one, else in the interpreter."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

import oracle
from cases import LARGE, LAUNCHED, OUTGROWN, SHAPES, SMALL_TILES, one_in, with_slow
from fastanila import noise, ops
from fastanila.ops import Metropolis, dispatch, metropolis, metropolis_step, reference
from fastanila.ops.reference import NORMS
from steps import DEVICE, DTYPES, MARKS, assert_equal_to_rounding, counting, draw

pytestmark = MARKS
NAMED = dict(seed=(1 << 63) + 5, step=(1 << 33) + 7)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that short chains outgrow."""
    for name, elements in SMALL_TILES.items():
        monkeypatch.setattr(dispatch.kernels.step_rows, name, elements)


class Case(NamedTuple):
    """What `metropolis_step` is given, in its order."""

    z: torch.Tensor
    score: torch.Tensor
    energy: torch.Tensor
    proposal: torch.Tensor
    proposal_score: torch.Tensor
    proposal_energy: torch.Tensor
    threshold: float

    def tensors(self):
        return self[:-1]

    def in_float64(self):
        return [t.double().cpu().numpy() for t in self.tensors()]

    def of(self, chains):
        return self._replace(**{name: getattr(self, name)[chains] for name in self._fields[:-1]})


def threshold_of(shape, norm):
    return 2.0 * math.sqrt(math.prod(shape[1:])) if norm == "chain" else 3.0


def make(shape, dtype=torch.float32, *, norm="element", threshold=None, seed=0, **settings) -> Case:
    """States some of which clip, with energies that make every acceptance probability differ from 0 and 1."""
    threshold = threshold_of(shape, norm) if threshold is None else threshold
    z, score = draw(shape, dtype, seed)
    proposal_score = (score + draw(shape, dtype, seed + 1)[1] / 3).to(dtype)
    score[-1] *= 2
    made = dict(NAMED, step_size=0.3, norm=norm) | settings
    with ops.plain():
        proposal = ops.anisotropic_step(z, score, threshold, **made)
    energy, shift = (draw((shape[0],), torch.float32, seed + i)[0] for i in (2, 3))
    case = Case(z, score, energy, proposal, proposal_score, energy, threshold)
    chosen = {name: made[name] for name in ("step_size", "norm")} | {"mask": as_numpy(made.get("mask"))}
    log_q = torch.tensor(oracle.log_accept(*case.in_float64(), threshold, **chosen)).to(energy)
    surprise = shift.abs() * torch.where(torch.arange(shape[0], device=DEVICE) % 2 == 0, 1.5, 0.3)
    return case._replace(proposal_energy=energy + log_q + surprise)


def as_numpy(mask):
    return None if mask is None else mask.cpu().numpy()


def check(case: Case, *, step_size=0.3, norm="element", offset=0, mask=None, seed, step) -> np.ndarray:
    """The kernel's transition is the formula's; returns which chains moved."""
    settings = dict(step_size=step_size, norm=norm, mask=as_numpy(mask))
    before = [t.clone() for t in case.tensors()]
    out = metropolis_step(*case, step_size=step_size, norm=norm, offset=offset, mask=mask, seed=seed, step=step)
    assert all(torch.equal(a, b) for a, b in zip(case.tensors(), before, strict=True))
    assert isinstance(out, Metropolis) and all(t.is_contiguous() for t in out)
    assert [t.dtype for t in out] == [t.dtype for t in (case.z, case.z, case.energy, case.z, case.energy)]

    chains, d = len(case.z), case.z[0].numel()
    alpha = np.minimum(1, np.exp(oracle.log_accept(*case.in_float64(), case.threshold, **settings)))
    # of log alpha: of the terms, of what shares a norm and errs together, and of a sum with the energies
    rounding = (1e-6 if DEVICE == "cpu" else 4e-6) * (2 + 2 * math.sqrt(d) + 0.1 * d)
    np.testing.assert_allclose(out.acceptance.double().cpu().numpy(), alpha, rtol=0, atol=rounding)

    u = oracle.uniforms(np.arange(offset, offset + chains, dtype=object), seed, step, stream=1)
    moved = (out.energy == case.proposal_energy).cpu().numpy()
    clear = np.abs(u - alpha) > rounding
    assert (~clear).sum() <= 1
    assert np.array_equal(moved[clear], (u < alpha)[clear])

    chosen = torch.tensor(moved, device=DEVICE).view(-1, *[1] * (case.z.dim() - 1))
    assert torch.equal(out.z, torch.where(chosen, case.proposal, case.z))
    assert torch.equal(out.score, torch.where(chosen, case.proposal_score, case.score))
    assert torch.equal(out.energy, torch.where(chosen.flatten(), case.proposal_energy, case.energy))

    xi = oracle.normals(np.arange(offset * d, (offset + chains) * d, dtype=object), seed, step + 1)
    want = oracle.step(
        out.z.double().cpu(), out.score.double().cpu(), case.threshold, xi.reshape(case.z.shape), **settings
    )
    assert_equal_to_rounding(out.proposal, want, case.z.dtype)
    return moved


def check_made(shape, dtype=torch.float32, *, threshold=None, **settings):
    if settings.get("norm") == "channel" and len(shape) == 1:
        pytest.skip("no channels")
    settings = NAMED | settings
    return check(make(shape, dtype, threshold=threshold, **settings), **settings)


@one_in(3, dtype=DTYPES, shape=SHAPES, norm=NORMS)
def test_it_equals_the_formula(poisoned, dtype, shape, norm):
    moved = check_made(shape, dtype, norm=norm)
    if len(moved) >= 33:
        assert 0.2 < moved.mean() < 0.8  # both are seen


@one_in(7, shape=OUTGROWN, norm=NORMS)
def test_chains_larger_than_a_tile(poisoned, small_tiles, shape, norm):
    view = dispatch.kernels.step_rows.view(shape, norm)
    tile = dispatch.kernels.metropolis.tile_of(view.channels, view.size, view.norm)
    assert view.size > tile.cols
    moved = [*check_made(shape, norm=norm), *check_made(shape, torch.bfloat16, norm=norm, offset=40)]
    assert shape == (1, 16, 6) or len(set(moved)) == 2  # both are seen


@pytest.mark.parametrize("norm", NORMS)
def test_chains_larger_than_the_largest_tile(poisoned, norm):
    check_made(LARGE[norm], norm=norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tiles", ["one tile", "more"])
def test_an_infinite_threshold_is_mala(poisoned, norm, tiles, request):
    if tiles == "more":
        request.getfixturevalue("small_tiles")
    case = make((3, 3, 24), norm=norm, threshold=math.inf, **NAMED)
    case.score[0], case.proposal_score[1], case.score[2, 0, 1] = 0.0, 0.0, 0.0
    check(case, norm=norm, **NAMED)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tiles", ["one tile", "more"])
def test_a_mask(poisoned, norm, tiles, request):
    if tiles == "more":
        request.getfixturevalue("small_tiles")
    shape = (3, 3, 24)
    buffer = torch.rand(3 * 24 + 1, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.5
    mask = buffer[1:].view(3, 1, 24)  # at an odd address
    case = make(shape, torch.bfloat16, norm=norm, mask=mask, **NAMED)
    still = ~mask.expand(shape)
    assert torch.equal(case.proposal[still], case.z[still])
    check(case, norm=norm, mask=mask, **NAMED)
    out = metropolis_step(*case, step_size=0.3, norm=norm, mask=mask, **NAMED)
    assert torch.equal(out.proposal[still], case.z[still])
    if norm == "element":  # elsewhere such a score has its part in the norm
        case.score[still], case.proposal_score[still] = math.nan, math.inf
        again = metropolis_step(*case, step_size=0.3, norm=norm, mask=mask, **NAMED)
        assert torch.equal(again.acceptance, out.acceptance) and torch.equal(again.proposal, out.proposal)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("offset", [1, (1 << 31) - 1, (1 << 40) + 1])
def test_offsets(poisoned, norm, offset):
    for shape in ((7, 3, 5), (7, 3, 4)):
        check_made(shape, norm=norm, offset=offset)


@one_in(3, tiles=["more", "one tile"], norm=NORMS)
def test_what_is_not_finite_is_rejected_and_the_chain_stays_finite(norm, tiles, request):
    if tiles == "more":
        request.getfixturevalue("small_tiles")
    broken = [
        ("score", math.nan), ("score", math.inf), ("proposal_score", math.nan), ("proposal_score", -math.inf),
        ("proposal", math.nan), ("proposal", math.inf), ("energy", math.nan), ("energy", math.inf),
        ("energy", -math.inf), ("proposal_energy", math.nan), ("proposal_energy", math.inf),
        ("proposal_energy", -math.inf),
    ]  # fmt: skip
    for threshold in (2.0, math.inf):
        case = make((len(broken) + 1, 2, 24), norm=norm, threshold=threshold, **NAMED)
        case.proposal_energy.sub_(100.0)  # all would be accepted
        for i, (name, value) in enumerate(broken):
            getattr(case, name)[i].reshape(-1)[-1] = value
        out = metropolis_step(*case, step_size=0.3, norm=norm, **NAMED)
        assert out.acceptance.tolist() == [0.0] * len(broken) + [1.0]
        kept = slice(0, len(broken))
        assert torch.equal(out.z[kept], case.z[kept]) and out.z.isfinite().all()
        torch.testing.assert_close(out.score[kept], case.score[kept], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(out.energy[kept], case.energy[kept], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(out.z[-1], case.proposal[-1]) and out.energy[-1] == case.proposal_energy[-1]
        assert out.proposal[2:].isfinite().all() and out.proposal[0].isnan().any()
        assert out.proposal[1].isfinite().all() or threshold == math.inf
        with ops.plain():
            plain = metropolis_step(*case, step_size=0.3, norm=norm, **NAMED)
        for one, other in zip(out, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1e37, 1e-30])
@pytest.mark.parametrize("tiles", ["one tile", "more"])
def test_norms_do_not_overflow(norm, size, tiles, request):
    """Where the score only changes its sign, the densities cancel and the energies remain."""
    if tiles == "more":
        request.getfixturevalue("small_tiles")
    z, score = draw((3, 3, 24), torch.float32)
    score, rise = size * score.sign(), z[:, 0, 0].abs()
    check(Case(z, score, torch.zeros_like(rise), z.clone(), -score, rise, 1.5), norm=norm, **NAMED)


@one_in(4, norm=NORMS, shape=[(37, 3, 20), (3, 3, 1500)])
def test_the_same_bits_at_every_run_and_in_every_batch(norm, shape):
    settings = NAMED | dict(norm=norm)
    case = make(shape, **settings)
    whole = metropolis_step(*case, step_size=0.3, **settings)
    again = metropolis_step(*case, step_size=0.3, **settings)
    assert all(map(torch.equal, whole, again))
    for i in {0, 2, len(case.z) - 1}:
        alone = metropolis_step(*case.of(slice(i, i + 1)), step_size=0.3, offset=i, **settings)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_numbers_and_tensors_agree(norm):
    numbers = dict(threshold=2.0, step_size=0.25, seed=-3, step=(1 << 40) + 1)
    case = make((9, 5, 2), **(numbers | dict(norm=norm)))
    as_tensors = {
        k: torch.tensor(v, device=DEVICE, dtype=torch.int64 if k in ("seed", "step") else torch.float32)
        for k, v in numbers.items()
    }
    out = metropolis_step(*case.tensors(), norm=norm, **numbers)
    assert all(map(torch.equal, out, metropolis_step(*case.tensors(), norm=norm, **as_tensors)))


@pytest.mark.parametrize("norm", with_slow(["channel"], ["element", "chain"]))
def test_layouts(norm):
    settings = NAMED | dict(norm=norm)
    case = make((6, 3, 4, 4), **settings)
    want = metropolis_step(*case, step_size=0.3, **settings)
    strided = case.z.transpose(1, 3).contiguous().transpose(1, 3)
    buffer = torch.zeros(6 * 48 + 1, device=DEVICE)
    laid_out = case._replace(
        z=strided,
        score=case.score.to(memory_format=torch.channels_last),
        proposal=buffer[1:].view(6, 3, 4, 4).copy_(case.proposal),
        energy=torch.stack([case.energy, case.energy], 1)[:, 0],
    )
    out = metropolis_step(*laid_out, step_size=0.3, **settings)
    assert all(map(torch.equal, out, want)) and all(t.is_contiguous() for t in out)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 3, 2), (3, 2, 0)], ids=str)
def test_empty(norm, shape):
    z, energy = torch.zeros(shape, device=DEVICE), torch.zeros(shape[:1], device=DEVICE)
    out = metropolis_step(z, z, energy, z, z, energy - 1, 1.0, norm=norm, seed=0, step=0)
    assert out.z.shape == out.score.shape == out.proposal.shape == z.shape
    assert out.acceptance.tolist() == [1.0] * shape[0] and out.energy.tolist() == [-1.0] * shape[0]


@pytest.mark.parametrize("channels", [2048, 2049])
def test_channels_beyond_a_tile_run_the_definition(channels, monkeypatch):
    launches = count_launches(monkeypatch)
    check_made((1, channels, 2), norm="channel", threshold=100.0)
    assert len(launches) == (channels == 2048)


def count_launches(monkeypatch) -> list[str]:
    return counting(monkeypatch, (dispatch.kernels.metropolis, "_launch_metropolis"))


@one_in(2, norm=NORMS, shape=LAUNCHED)
def test_one_launch(norm, shape, monkeypatch):
    settings = dict(norm=norm, seed=torch.tensor(1, device=DEVICE), step=2, step_size=0.3)
    case = make(shape, norm=norm, seed=1, step=2)
    metropolis_step(*case, **settings)  # compiles, on a GPU
    launches = count_launches(monkeypatch)
    metropolis_step(*case, **settings)
    assert len(launches) == 1
    if DEVICE == "cuda":  # nothing beside it either
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            metropolis_step(*case, **settings)
            torch.cuda.synchronize()
        on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        made = [name for name in on_device if "Activity Buffer" not in name and "Sync" not in name]  # the profiler's
        if not made:
            pytest.skip("the profiler saw nothing on the device: the launch was counted, what is beside it was not")
        assert len(made) == 1 and "metropolis_kernel" in made[0], made


def transitions(z, threshold, seed, step, norm, count):
    """A chain on U = |z|^2 / 2, in the operator's own words."""
    score, energy = -z, 0.5 * z.square().flatten(1).sum(1)
    settings = dict(step_size=0.5, norm=norm, seed=seed)
    proposal = ops.anisotropic_step(z, score, threshold, step=step, **settings)
    for i in range(count):
        its_energy = 0.5 * proposal.square().flatten(1).sum(1)
        z, score, energy, proposal, acceptance = metropolis_step(
            z, score, energy, proposal, -proposal, its_energy, threshold, step=step + i, **settings
        )
    return z, score, energy, proposal, acceptance


@pytest.mark.parametrize("norm", with_slow([], ["chain", "element", "channel"]))
def test_compiled_with_the_kernel_inside(norm):
    z = draw((9, 5, 2), torch.float32)[0]
    args = (torch.tensor(2.0, device=DEVICE), torch.tensor(1, device=DEVICE), torch.tensor(2, device=DEVICE))
    out = torch.compile(transitions, fullgraph=True)(z, *args, norm, 3)
    torch.testing.assert_close(out, transitions(z, *args, norm, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA device")
def test_a_captured_chain_draws_anew_at_every_replay():
    z = draw((9, 5, 2), torch.float32)[0]
    threshold, seed, step = (torch.tensor(x, device=DEVICE) for x in (2.0, 1, 2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles
        transitions(z, threshold, seed, step, "chain", 2)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = transitions(z, threshold, seed, step, "chain", 3)
    for at in (2, 5, (1 << 33) + 1):
        step.fill_(at)
        graph.replay()
        assert all(map(torch.equal, out, transitions(z, threshold, seed, step, "chain", 3)))


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm):
    case = make((5, 3, 2), norm=norm, **NAMED)
    mask = torch.rand(3, 1, device=DEVICE) < 0.5
    for given in ((1, 2, None), (torch.tensor(1, device=DEVICE), torch.tensor(2, device=DEVICE), mask)):
        seed, step, mask = given
        tensors, rest = metropolis.prepare(*case, 0.3, norm, seed, step, 0, mask)
        torch.library.opcheck(torch.ops.fastanila.metropolis_step.default, (*tensors, *rest))


def test_the_uniforms_are_the_streams():
    """A proposal as likely as the state, but for its energy, is accepted where -log u exceeds the rise."""
    z = draw((400, 3), torch.float32)[0]
    zero, energy = torch.zeros_like(z), torch.zeros(400, device=DEVICE)
    u = noise.uniform((400,), seed=5, step=6, stream=noise.Stream.ACCEPTANCE, offset=3, device=DEVICE)
    for rise in (0.1, 1.0, 3.0):
        out = metropolis_step(z, zero, energy, z + 1, zero, energy + rise, 1.0, seed=5, step=6, offset=3)
        clear = (u.log() + rise).abs() > 1e-5
        assert torch.equal((out.energy > 0)[clear], (u.log() < -rise)[clear]) and clear.sum() > 395
        torch.testing.assert_close(out.acceptance, torch.full_like(out.acceptance, math.exp(-rise)))


def test_the_plain_definition_is_the_operators():
    case = make((5, 3), **NAMED)
    settings = NAMED | dict(step_size=0.3)
    fused = metropolis_step(*case, **settings)
    with ops.plain():
        plain = metropolis_step(*case, **settings)
    want = reference.metropolis_step(
        *case,
        step_size=0.3,
        uniform=noise.uniform((5,), stream=noise.Stream.ACCEPTANCE, device=DEVICE, **NAMED),
        noise=noise.normal((5, 3), device=DEVICE, seed=NAMED["seed"], step=NAMED["step"] + 1),
    )
    assert all(map(torch.equal, plain, want))
    torch.testing.assert_close(tuple(fused), tuple(plain), rtol=1e-5, atol=1e-5)
