"""The rows of the table: every goal belongs to a way, is one that can be reached, and is the one that was set."""

import contextlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import chain_rows, limits, rivals, rows, table
from bench.row import AUTHORS, CAPTURED, COMPILED, COPY, GROUPS, MALA_BY_HAND, OURS, PLAIN, UNADJUSTED
from fastanila import ops
from fastanila.models import ConvNet

pytestmark = pytest.mark.skipif(ops.INTERPRETED, reason="the interpreter has rows of its own")


def ways_of(kind: str) -> dict[str, set[str]]:
    """The ways of every row by its work."""
    with contextlib.ExitStack() as closing:
        return {row.work: set(row.build(torch.device(kind), closing)) for row in rows.rows(kind)}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_goal_belongs_to_a_way(kind):
    found, ways_by_work = rows.rows(kind), ways_of(kind)
    assert len(ways_by_work) == len(found) and {row.group for row in found} == set(GROUPS)
    for row in found:
        ways = ways_by_work[row.work]
        assert {OURS, CAPTURED} >= set(row.at_least) and set(row.at_least) <= ways, row.work
        assert {*row.at_most, *itertools.chain(*row.at_least.values())} <= ways, row.work
        assert OURS in ways or row.group == "startup"
        assert row.group != "step" or COPY in ways


def test_a_gpu_takes_first_what_matters_most():
    found = rows.rows("cuda")
    turns = rows.in_order_of_interest(found)
    assert sorted(row.work for row in turns) == sorted(row.work for row in found)
    assert tuple(row.work for row in turns[: len(rows.FIRST)]) == rows.FIRST
    assert [row.group for row in turns[-3:]] == ["host", "noise", "startup"]


def test_the_goals_are_those_that_were_set():
    cuda, cpu = ({row.work: row.at_least for row in rows.rows(kind)} for kind in ("cuda", "cpu"))
    step = cuda["step, 2^26, float32"][OURS]
    assert step == {COPY: 0.92, COMPILED: 1.4, "eager": limits.eager_over_step()}
    assert cuda["step, 2^26, bfloat16"][OURS][COMPILED] == 2.5
    small, large = (cuda[f"mlp-{width}, 1,024 x 2 x 100, float32"] for width in (64, 128))
    assert large[OURS]["torchebm"] == 100 and large[CAPTURED]["torchebm"] == 20
    assert small[OURS]["torch.compile, reduce-overhead, rand4x"] == small[OURS][chain_rows.BY_HAND] == 10
    assert cuda["mlp-64, 16,384 x 2 x 100, float32"][CAPTURED][COMPILED] == 3
    assert cuda["mlp-128, 16,384 x 2 x 100, float32"][CAPTURED][COMPILED] < 2  # products that both make
    assert chain_rows.BY_HAND not in cuda["mlp-64, 64 x 8 x 50, float32"][CAPTURED]
    wide = cuda["mlp-64, 1,024 x 128 x 200, float32"]
    assert wide.keys() == {OURS}  # captured by itself
    assert wide[OURS]["torchebm"] == 20 and wide[OURS]["torch.compile, reduce-overhead"] == 3
    assert cuda["mixture, 10,000 x 2 x 100, float32"][OURS][chain_rows.BY_HAND] < 10
    images = cuda["convnet-32, 64 x 3x32x32 x 100, float32"][OURS]
    assert images[chain_rows.FLOOR] == 1 / 1.1 and "its convolutions alone" not in images
    assert cuda["convnet-32, 64 x 3x32x32 x 100, bf16"][OURS]["eager loop in float32"] == 5
    assert cuda["adjusted, a gain per chain: convnet-32, 64 x 3x32x32 x 100, float32"] == {OURS: {UNADJUSTED: 1 / 1.1}}
    assert cuda["one update, rings, K=60"][OURS][AUTHORS] == 40
    assert cpu["step, 2^24, float32"][OURS] == {"eager": 4.0, COMPILED: 2.0}
    assert cpu["normals, 2^24"][OURS] == {"torch.randn": 3.0}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_default_job_and_exact_chains_have_rows(kind):
    found = ways_of(kind)
    for work in (
        "one update, rings, the default, K=60",
        "exact: mlp-64, 1,024 x 2 x 100, float32",
        "exact: mixture, 10,000 x 2 x 100, float32",
    ):
        assert {OURS, UNADJUSTED, MALA_BY_HAND} <= found[work]
        assert (PLAIN in found[work]) == (kind == "cpu" or work.startswith("one update"))
        assert (CAPTURED in found[work]) == (kind == "cuda" and work.startswith("exact"))
    of_images = {work for work, ways in found.items() if "3x32x32" in work and AUTHORS in ways}
    assert bool(of_images) == (kind == "cpu")  # the host of a GPU holds that form up
    assert AUTHORS in found["one update, rings, K=60"]


@pytest.mark.slow
def test_every_process_of_the_start_up_row_succeeds():
    with contextlib.ExitStack() as closing:
        builders = rows.startup_row("cpu").build(torch.device("cpu"), closing)
        ways, notes = table.built(builders, torch.device("cpu"))
    assert len(ways) == 5 and not notes


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        rows.python("-S", "-c", "1 / 0")


# ---------------------------------------------------------------------------------------------------------- limits


class Counted(TorchDispatchMode):
    """How many tensors of z's size the calls read and write."""

    passes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        self.passes += 1 + (0 if function is torch.ops.aten.randn_like.default else len(tensors))
        return function(*args, **(kwargs or {}))


def test_the_eager_steps_bytes_are_those_of_its_kernels():
    z, score = torch.zeros(8), torch.ones(8)
    with Counted() as counted:
        rivals.eager_step(z, score)
    assert counted.passes == limits.EAGER_PASSES
    assert limits.eager_over_step() == pytest.approx(18 / 3 * 0.92)


def test_the_limits_of_chains():
    few, many = (limits.over_mlp(chains, 2, 64, 100, whole=True) for chains in (1024, 16384))
    # of few chains both sides are bound by launches: 12 nodes a transition against one run's time on the host
    assert few.captured == pytest.approx(100 * 12 * limits.NODE / limits.RUN)
    assert few.launched == pytest.approx(100 * 12 * limits.LAUNCH / limits.RUN)
    # of many, ours is bound by its instructions: 2 * 4,288 products of 16,384 states, 1.7 instructions each
    assert limits.whole_mlp_run(16384, 2, 64, 100) == pytest.approx(100 * 16384 * 8576 * 1.7 / limits.LANES)
    assert many.captured < few.captured < few.launched < few.eager
    assert limits.over_mlp(64, 8, 64, 50, whole=False).captured == pytest.approx(12 / 8)  # all of them small
    # wide ones are bound by products (here inner ones alone) and bytes, which no capture saves
    wide = limits.captured_mlp_run(limits.Kernels(0, 0), 1 << 20, 2, 128, 1)
    assert wide == pytest.approx(
        2 * (1 << 20) * 128 * 128 / limits.LANES + 2 * 4 * (1 << 20) * (128 + 2) / limits.BANDWIDTH
    )


def test_the_convnets_bytes_are_its_layers():
    shape, width, sizes = (2, 3, 16, 16), 8, []
    energy = ConvNet(3, 16, width)
    for layer in energy.layers[::2]:
        layer.register_forward_hook(lambda layer, inputs, output: sizes.append(4 * output.numel()))
    energy(torch.zeros(shape))
    states = 3 * 4 * 2 * 3 * 16 * 16
    assert len(sizes) == 4 and len(limits.pointwise_bytes(shape, width, 4)) == 9
    assert sum(limits.pointwise_bytes(shape, width, 4)) == 5 * sum(sizes) + states
    assert sum(limits.pointwise_bytes(shape, width, 2)) == 5 * sum(sizes) / 2 + states  # the states stay float32
    images = chain_rows.pointwise_bytes(chain_rows.IMAGES["float32"])
    assert images == limits.pointwise_bytes((64, 3, 32, 32), 32, 4) and 80e6 < sum(images) < 82e6
