"""The operator's face: checks, registration, compilation, and its CPU path."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import oracle
from cases import with_slow
from fastanila import AniLA, noise, ops
from fastanila.ops import anisotropic_step, anisotropic_step_, dispatch, reference
from fastanila.ops import step as step_ops


def draw(shape=(5, 3), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype), 3 * torch.randn(shape, generator=generator).to(dtype)


def formula(z, score, threshold, *, seed, step, offset=0, **options):
    d = math.prod(z.shape[1:])
    xi = oracle.normals(np.arange(offset * d, offset * d + z.numel(), dtype=object), seed, step).reshape(z.shape)
    return oracle.step(z.double(), score.double(), threshold, xi, **options)


# -------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("threshold", [0.5, 3.0, math.inf])
@pytest.mark.parametrize("shape", [(1,), (4, 1), (3, 5), (2, 3, 4, 4)], ids=str)
def test_the_definition_equals_the_formula(norm, threshold, shape):
    if norm == "channel" and len(shape) == 1:
        pytest.skip("no channels")
    z, score = (t.double() for t in draw(shape))
    xi = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = reference.anisotropic_step(z, score, threshold, step_size=0.3, noise_scale=0.7, norm=norm, noise=xi)
    want = oracle.step(z, score, threshold, xi, step_size=0.3, noise_scale=0.7, norm=norm)
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-12, atol=1e-12)


def test_the_papers_step():
    """eps = sigma = 1: z + gamma/2 s + sqrt(gamma) xi with gamma = b / max(b, |s|)."""
    z, s, xi = torch.tensor([[0.5]]), torch.tensor([[4.0]]), torch.tensor([[-2.0]])
    out = reference.anisotropic_step(z, s, 1.0, noise=xi)
    assert out.item() == pytest.approx(0.5 + 0.25 / 2 * 4 + 0.5 * -2)


@pytest.mark.parametrize("norm", ["channel", "chain"])
def test_norms_do_not_overflow(norm):
    sharing = 3 if norm == "channel" else 6
    for huge in (1e30, 3e38, math.inf):
        gain, drift = reference.clipped(torch.full((2, 3, 2), huge), 2.0, norm)
        assert gain.max().item() == pytest.approx(2 / huge / math.sqrt(sharing), rel=1e-5)
        torch.testing.assert_close(drift, torch.full((2, 3, 2), 2 / math.sqrt(sharing)))
    gain, drift = reference.clipped(torch.zeros(2, 3, 2), 1.0, norm)
    assert torch.equal(gain, torch.ones_like(gain)) and not drift.any()
    one = torch.tensor([[[1.0], [math.inf], [-5.0]], [[1.0], [math.nan], [2.0]]])
    drift = reference.clipped(one, 2.0, norm)[1]
    assert drift[0].flatten().tolist() == [0, 2, 0] and drift[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_face_equals_the_formula(dtype):
    z, score = draw((7, 5), dtype)
    settings = dict(
        seed=(1 << 64) - 9, step=(1 << 35) + 1, offset=3, step_size=0.4, noise_scale=0.6, bounds=(-1.0, 2.0)
    )
    out = anisotropic_step(z, score, 1.5, **settings)
    assert out.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    np.testing.assert_allclose(out.double(), formula(z, score, 1.5, **settings), rtol=tolerance, atol=tolerance)


def test_scores_that_are_not_finite():
    z, score = draw((2, 3))
    score[0, 0], score[0, 1], score[0, 2] = math.inf, -math.inf, math.nan
    out = anisotropic_step(z, score, 2.0, step_size=0.5, seed=0, step=0)
    torch.testing.assert_close(out[0, :2], z[0, :2] + torch.tensor([0.5, -0.5]))
    assert out[0, 2].isnan() and out[1].isfinite().all()
    assert not anisotropic_step(z, score, math.inf, seed=0, step=0)[0].isfinite().any()


# ------------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("function", [anisotropic_step, anisotropic_step_])
def test_the_result_is_detached(function):
    z, score = draw()
    leaf = z.clone().requires_grad_()
    score = (score.requires_grad_() * 2).clone()
    out = function(leaf, score, 1.0, seed=0, step=0)
    assert torch.equal(out.detach(), anisotropic_step(z, score, 1.0, seed=0, step=0))
    if function is anisotropic_step:
        assert not out.requires_grad and out.data_ptr() != leaf.data_ptr()
    else:
        assert out is leaf and leaf.is_leaf and leaf.requires_grad and leaf.grad_fn is None


def test_in_place_keeps_the_layout_and_refuses_overlap():
    z, score = draw((4, 3, 5))
    want = anisotropic_step(z, score, 1.0, seed=0, step=0)
    strided = z.transpose(0, 2).contiguous().transpose(0, 2)
    address, strides = strided.data_ptr(), strided.stride()
    assert anisotropic_step_(strided, score, 1.0, seed=0, step=0) is strided
    assert torch.equal(strided, want) and (strided.data_ptr(), strided.stride()) == (address, strides)
    assert anisotropic_step(strided, score, 1.0, seed=0, step=0).is_contiguous()
    with pytest.raises(RuntimeError, match="single memory location"):
        anisotropic_step_(torch.zeros(1, 3).expand(4, 3), torch.zeros(4, 3), 1.0, seed=0, step=0)


def test_a_chain_alone_equals_the_same_chain_in_a_batch():
    z, score = draw((9, 3))
    whole = anisotropic_step(z, score, 1.0, seed=4, step=5)
    for i in range(9):
        alone = anisotropic_step(z[i : i + 1], score[i : i + 1], 1.0, seed=4, step=5, offset=i)
        assert torch.equal(alone[0], whole[i])


def test_without_a_seed_torchs_generator_governs():
    z, score = draw((100, 3))
    torch.manual_seed(5)
    a, b = anisotropic_step(z, score, 1.0), anisotropic_step(z, score, 1.0)
    assert not torch.isclose(a, b).any()
    torch.manual_seed(5)
    assert torch.equal(anisotropic_step(z, score, 1.0), a)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)], ids=str)
def test_empty(shape):
    z = torch.zeros(shape)
    assert anisotropic_step(z, z, 1.0, norm="chain", seed=0, step=0).shape == z.shape
    ran = AniLA().run(None, z, score=torch.neg, steps=2, seed=0, compile=False)
    assert ran.shape == z.shape
    assert anisotropic_step(z, z, 1.0, seed=0, step=0).shape == z.shape
    assert anisotropic_step_(z, z, 1.0) is z


# ------------------------------------------------------------------------------------- registration and compilation


ARGUMENTS = [
    dict(threshold=1.0, seed=3, step=4),
    dict(threshold=torch.tensor(1.0), seed=torch.tensor(3), step=torch.tensor(4), bounds=(-1.0, 1.0)),
    dict(threshold=None, gamma=torch.rand(3), mask=torch.tensor([[True], [False]] * 2 + [[True]]), seed=1, step=1),
    dict(threshold=2.0, norm="chain", seed=1, step=1, step_size=torch.tensor(0.1), noise_scale=torch.tensor(0.5)),
]


@pytest.mark.parametrize("options", ARGUMENTS, ids=["numbers", "tensors", "gamma", "chain"])
def test_opcheck(options):
    z, score = draw()
    defaults = dict(step_size=1.0, noise_scale=1.0, norm="element", offset=0, gamma=None, mask=None, bounds=None)
    order = ["threshold", "step_size", "noise_scale", "norm", "seed", "step", "offset", "gamma", "mask", "bounds"]
    chosen = defaults | options
    z, score, rest = step_ops.prepare(z, score, *[chosen[name] for name in order])
    arguments = (score, *rest)
    torch.library.opcheck(torch.ops.fastanila.anisotropic_step.default, (z, *arguments))
    torch.library.opcheck(torch.ops.fastanila.anisotropic_step_.default, (z, *arguments))
    torch.library.opcheck(torch.ops.fastanila.anisotropic_step_statistics.default, (z, *arguments))
    torch.library.opcheck(torch.ops.fastanila.anisotropic_step_statistics_.default, (z, *arguments))
    out = torch.ops.fastanila.anisotropic_step(z, *arguments)
    assert torch.equal(out, anisotropic_step(z, score, **options))


# what Inductor makes of it takes tens of seconds: those are slow, but for a few
backends = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


def test_changing_scalars_do_not_recompile():
    def f(z, threshold, step_size, noise_scale, seed, step):
        return anisotropic_step(z, -z, threshold, step_size=step_size, noise_scale=noise_scale, seed=seed, step=step)

    counter = CompileCounter()
    counting = torch.compile(f, fullgraph=True, backend=counter)
    fast = torch.compile(f, fullgraph=True)
    z, _ = draw()
    for i in range(1, 7):
        numbers = [torch.tensor(x) for x in (0.3 * i, 0.1 * i, 0.2 * i)]
        names = [torch.tensor(x) for x in (i - (1 << 62), i << 33)]
        torch.testing.assert_close(fast(z, *numbers, *names), f(z, *numbers, *names), rtol=0, atol=1e-6)
        counting(z, *numbers, *names)
    assert counter.frame_count == 1


# slow: a step of 1 is a graph of its own
@pytest.mark.parametrize(
    "calls", with_slow([[(0.5, 0), (2.0, (1 << 33) + 1), (0.7, 5)]], [[(0.5, 0), (2.0, 1), (0.7, 5)]])
)
def test_numbers_compile_too(calls):
    def f(z, threshold, step):
        return anisotropic_step(z, -z, threshold, step_size=0.1, seed=(1 << 64) - 1, step=step)

    z, _ = draw()
    compiled = torch.compile(f, fullgraph=True)
    for threshold, step in calls:
        torch.testing.assert_close(compiled(z, threshold, step), f(z, threshold, step), rtol=0, atol=1e-6)


@backends
def test_in_place_compiles(backend):
    def f(z, step):
        for _ in range(3):
            anisotropic_step_(z, -z, 0.5, seed=1, step=step)
            step = step + 1
        return z * 1

    a, b = draw()[0], draw()[0]
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(a, torch.tensor(2)), f(b, torch.tensor(2)))
    torch.testing.assert_close(a, b)


@backends
def test_a_gradient_inside_one_graph(backend):
    net = torch.nn.Linear(3, 1)

    def f(z, step):
        gradient = torch.func.grad(lambda x: net(x).square().sum())(z)
        return anisotropic_step(z, -gradient, 0.5, seed=1, step=step)

    with torch.no_grad():
        z = draw()[0]
        out = torch.compile(f, fullgraph=True, backend=backend)(z, torch.tensor(2))
        torch.testing.assert_close(out, f(z, torch.tensor(2)))


# ------------------------------------------------------------------------------------------------------------ errors

Z, S = draw()
ERRORS = {
    "score shape": (dict(score=S[:, :2]), ValueError, r"score must have z's shape \(5, 3\), got \(5, 2\)"),
    "score dtype": (dict(score=S.double()), TypeError, "score must have z's dtype torch.float32, got torch.float64"),
    "score device": (dict(score=S.to("meta")), ValueError, "score must be on z's device cpu, got meta"),
    "score type": (dict(score=S.numpy()), TypeError, "score must be a tensor, got ndarray"),
    "z integer": (dict(z=Z.int(), score=S.int()), TypeError, "z must be float32, bfloat16 or float16, got torch.int32"),
    "z float64": (dict(z=Z.double(), score=S.double()), TypeError, "z must be .* got torch.float64"),
    "z 0-dim": (dict(z=Z[0, 0], score=S[0, 0]), ValueError, "z must have a dimension of chains"),
    "threshold 0": (dict(threshold=0.0), ValueError, "threshold must be positive or inf, got 0.0"),
    "threshold < 0": (dict(threshold=-1), ValueError, "threshold must be positive or inf, got -1"),
    "threshold NaN": (dict(threshold=math.nan), ValueError, "threshold must be positive or inf, got nan"),
    "threshold None": (dict(threshold=None), ValueError, "threshold must be .* unless gamma is given, got None"),
    "threshold and gamma": (dict(gamma=torch.ones(3)), ValueError, "threshold must be None when gamma is given"),
    "threshold vector": (dict(threshold=torch.ones(3)), TypeError, "threshold must be a number or a 0-dim floating"),
    "threshold int tensor": (dict(threshold=torch.tensor(1)), TypeError, "threshold must be .* torch.int64 tensor"),
    "threshold device": (dict(threshold=torch.ones((), device="meta")), ValueError, "threshold must be on z's device"),
    "threshold string": (dict(threshold="1"), TypeError, "threshold must be a number .* got str"),
    "step_size 0": (dict(step_size=0.0), ValueError, "step_size must be positive and finite, got 0.0"),
    "step_size inf": (dict(step_size=math.inf), ValueError, "step_size must be positive and finite, got inf"),
    "noise_scale < 0": (dict(noise_scale=-0.1), ValueError, "noise_scale must be at least 0 and finite, got -0.1"),
    "norm": (dict(norm="pixel"), ValueError, "norm must be one of element, channel, chain, got 'pixel'"),
    "channel of vectors": (dict(z=Z[:, 0], score=S[:, 0], norm="channel"), ValueError, "norm='channel' needs"),
    "seed without step": (dict(step=None), ValueError, "seed was given, step was not"),
    "step without seed": (dict(seed=None), ValueError, "step was given, seed was not"),
    "seed float": (dict(seed=1.0), TypeError, "seed must be an int or a 0-dim int64 tensor, got float"),
    "seed int32": (dict(seed=torch.tensor(1, dtype=torch.int32)), TypeError, "seed must be .* got a torch.int32"),
    "step < 0": (dict(step=-1), ValueError, r"step must be in \[0, 2\*\*56\), got -1"),
    "step 2^56": (dict(step=1 << 56), ValueError, "step must be in"),
    "offset < 0": (dict(offset=-1), ValueError, "offset must be at least 0, got -1"),
    "offset float": (dict(offset=0.5), TypeError, "offset must be an int, got float"),
    "gamma shape": (dict(threshold=None, gamma=torch.ones(2)), ValueError, "gamma must broadcast to z's shape"),
    "gamma int": (dict(threshold=None, gamma=torch.ones(3).int()), TypeError, "gamma must be of a floating dtype"),
    "mask dtype": (dict(mask=torch.ones(3)), TypeError, "mask must be a bool tensor, got torch.float32"),
    "mask shape": (dict(mask=torch.ones(4, 3) > 0), ValueError, "mask must broadcast to z's shape"),
    "bounds order": (dict(bounds=(1.0, -1.0)), ValueError, "bounds must be a pair with low < high"),
    "bounds NaN": (dict(bounds=(math.nan, 1.0)), ValueError, "bounds must be a pair with low < high"),
    "bounds triple": (dict(bounds=(0.0, 1.0, 2.0)), ValueError, "bounds must be a pair"),
}


@pytest.mark.parametrize("function", [anisotropic_step, anisotropic_step_])
@pytest.mark.parametrize("name", ERRORS)
def test_bad_arguments_are_named(function, name):
    change, error, message = ERRORS[name]
    arguments = dict(z=Z.clone(), score=S, threshold=1.0, seed=0, step=0) | change
    with pytest.raises(error, match=message):
        function(**arguments)


def test_numpy_numbers_are_numbers():
    z, score = draw()
    a = anisotropic_step(z, score, np.float32(1.5), seed=np.int64(3), step=np.int32(4))
    assert torch.equal(a, anisotropic_step(z, score, 1.5, seed=3, step=4))


def test_what_is_fused(monkeypatch):
    """On this machine, and as it would be where the kernels run."""
    z, many = torch.zeros(2, 2048, 3), torch.zeros(2, 2049, 3)
    assert not ops.fused(z) and not ops.fused(torch.device("cpu"), "chain")
    if not dispatch.TRITON:
        pytest.skip("triton is not installed")
    assert all(ops.fused(torch.device("cuda"), norm) for norm in reference.NORMS)
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert all(ops.fused(z, norm) for norm in reference.NORMS)
    assert ops.fused(many, "element") and ops.fused(many, "chain") and not ops.fused(many, "channel")
    assert ops.fused(many[..., 0], "channel")  # one pixel: the norm of the chain
    with ops.plain():
        assert not ops.fused(z) and not ops.fused(torch.device("cuda"))
    assert ops.fused(z)


def test_plain_holds_until_the_last_thread_has_left(monkeypatch):
    if not dispatch.TRITON:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    z, first, second = torch.zeros(2, 2), ops.plain(), ops.plain()
    first.__enter__()
    second.__enter__()  # of another thread, which leaves later
    first.__exit__(None, None, None)
    assert not ops.fused(z)
    second.__exit__(None, None, None)
    assert ops.fused(z)
    with pytest.raises(ArithmeticError), ops.plain():
        raise ArithmeticError
    assert ops.fused(z)


def test_the_cpu_path_needs_no_triton():
    """As on macOS and Windows, where triton cannot be had."""
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Absent())
import torch, fastanila
from fastanila.ops import anisotropic_step
print(anisotropic_step(torch.zeros(2, 2), torch.ones(2, 2), 1.0, seed=0, step=0).shape)
z = fastanila.AniLA().run(lambda x: x.square().sum(1), torch.zeros(3, 2), steps=3, seed=0, compile=False)
print(z.isfinite().all().item())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["torch.Size([2, 2])", "True"]


def test_noise_comes_from_the_langevin_stream():
    z = torch.zeros(6, 2)
    assert torch.equal(anisotropic_step(z, z, 1.0, seed=7, step=8), noise.normal(z.shape, seed=7, step=8, stream=0))


def test_what_traces_or_watches_goes_through_the_dispatcher():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    z = torch.zeros(3, 2)
    assert dispatch.direct(z, z.clone())
    assert not dispatch.direct(z, torch.nn.Parameter(z))
    with TorchDispatchMode():
        assert not dispatch.direct(z)
    with FakeTensorMode() as mode:
        assert not dispatch.direct(mode.from_tensor(z))
    seen = []
    torch.func.vmap(lambda row: seen.append(dispatch.direct(row)) or row)(z)
    assert seen == [False]


def test_a_tensor_off_the_16_bytes_is_copied_to_them():
    buffer = torch.arange(9.0)
    off = buffer[1:]
    assert dispatch.aligned(buffer) is buffer
    assert torch.equal(dispatch.aligned(off), off) and dispatch.aligned(off).data_ptr() % 16 == 0
