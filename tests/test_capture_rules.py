"""Chains and updates keep CUDA's capture rules and their budgets of launches, and a capture that fails breaks nothing.

It runs on a CUDA device without kernels (support/fake_device.py), so wherever there is g++ and a torch with CUDA.
The numbers that captured chains and updates give are compared on a GPU, by tests/kernels/test_capture.py.
"""

import pytest
from torch._inductor.fx_passes import post_grad

import fake_device
import nodes
import rules

pytestmark = [
    pytest.mark.skipif(
        fake_device.unavailable() is not None, reason=fake_device.unavailable() or "the device can be had"
    ),
    pytest.mark.xdist_group("device"),  # which takes all cases in one process
]

#: Launches at most: of one transition of a captured chain, of a run of 100 transitions, of an update.
BUDGETS = {
    "transition: mlp, 128-d": 8,  # four products, three elementwise kernels, the step
    "transition: convnet, float32": 18,  # eight convolutions, nine elementwise kernels, the step
    "transition: convnet, tf32": 18,
    "transition: convnet, bf16": 18,
    # newer Inductors make the sum with a confinement's gradient part of the product: two kernels and a copy for one
    "transition: mlp, adjusted": 15 if hasattr(post_grad, "_is_bias_like_addmm_input") else 13,
    "run: mixture": 3,
    "run: mlp": 3,
    "run: mixture, adjusted": 3,
    "run: mlp, adjusted": 3,
    "run: mlp, mala": 3,
    "update: rings, anila": 40,
    "update: rings, the default": 40,
    "update: rings, a vae proposes": 95,
    "update: images, bf16": 1150,
}
#: What is run every time: kernels of each kind but convolutions, in few compilations.
QUICK = {
    "transition: mlp, 128-d",
    "transition: mlp, adjusted",
    "run: mixture",
    "run: mlp",
    "run: mlp, adjusted",
    "update: rings, the default",
}


def by_time(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def found(request):
    """What the selected cases launched, all of them counted in one process."""
    asked = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    results = nodes.counts([name for name in nodes.CASES if name in asked])
    return lambda name: nodes.Counted(*result_of(results[name]))


@pytest.fixture(scope="module")
def refused():
    results = fake_device.run(rules.__file__, [*rules.REFUSED, *rules.OTHERS])
    return lambda name: result_of(results[name])


def result_of(found):
    missing = ", ".join(sorted(set(found.get("missing", ()))))
    if missing and not fake_device.tested():
        pytest.skip(f"this torch calls {missing}, which the device without kernels has not learned yet")
    assert not missing, missing
    assert "error" not in found, found["error"]
    return found["result"]


# ------------------------------------------------------------------------------------------------------ what we capture


@pytest.mark.parametrize("name", by_time(name for name in nodes.CASES if not name.startswith("run")))
def test_it_is_captured_once_and_replayed(name, found):
    counted = found(name)
    assert counted.violations == []
    assert (counted.graphs, counted.replays) == (1, 2)
    assert len(counted.launches) > 0


@pytest.mark.parametrize("name", by_time(BUDGETS))
def test_it_launches_no_more_than_its_budget(name, found):
    counted = found(name)
    assert len(counted.launches) <= BUDGETS[name], "\n" + "\n".join(counted.launches)
    assert counted.violations == []


def test_the_budgets_are_of_cases():
    assert set(BUDGETS) | QUICK <= set(nodes.CASES)


# ---------------------------------------------------------------------------------------------------- the device itself


@pytest.mark.parametrize(
    ("name", "violation"),
    [
        ("a synchronisation", "cudaStreamSynchronize of a capturing stream"),
        ("a synchronisation of the device", "cudaDeviceSynchronize during a capture"),
        ("a pageable copy", "copy host to device, pageable, during a capture"),
        ("an allocation outside the pool", "cudaMalloc during a capture"),
        ("work on the default stream", "on the default stream during a capture"),
        ("a module load", "a module load during a capture"),
        ("unjoined work", "a capture ends ahead of work in another stream"),
        ("a query of a captured event", "cudaEventQuery of a captured event"),
        ("a wait for an event from outside", "a capturing stream waits for an event from outside"),
    ],
)
def test_the_device_refuses(name, violation, refused):
    case = refused(name)
    assert case["failed"] and case["graphs"] == 0
    assert len(case["violations"]) == 1 and violation in case["violations"][0]


def test_the_device_reports_a_replay_on_memory_that_was_given_back(refused):
    case = refused("given back")
    assert case["before"] == []
    assert case["after"] == ["copy device to device, replayed, of memory that was given back"]


def test_the_device_permits_what_cuda_does(refused):
    case = refused("permitted")
    assert case["violations"] == [] and len(case["graphs"]) == 1
    (launches,) = case["graphs"]
    assert launches[-1] == "copy host to device"
    assert sum("Mul" in name for name in launches) >= 2 and any("reduce" in name for name in launches)


def test_the_device_replays_copies_and_fills(refused):
    assert refused("replayed") == {"captured": [2.0] * 4 + [3.0] * 4, "replayed": [5.0] * 4 + [0.0] * 4}


def test_calls_are_replayed_after_a_warm_up_on_the_stream_of_the_capture(refused):
    case = refused("calls")
    assert case["adds"] == dict(graphs=1, replays=4, said=0, kinds=["Tensor"] * 6)
    assert case["synchronises"] == dict(graphs=0, replays=0, said=1, kinds=["float"] * 6)
    assert case["streams"] == 3 and case["one"]  # twice as it is, once captured


def test_another_thread_that_warms_up_waits_for_the_end_of_a_capture(refused):
    assert refused("threads") == dict(nodes=[1], added=2)


# ----------------------------------------------------------------------------------------------- after a failed capture


def test_random_numbers_are_drawn_after_a_capture_that_fails(refused):
    assert refused("draws") == {"drawn": 4, "captured": 8, "again": 4}


def test_a_graph_from_before_a_capture_that_fails_is_replayed(refused):
    assert refused("replays") == {"replayed": 8}


def test_memory_is_given_back_and_reused_after_a_capture_that_fails(refused):
    megabytes = refused("memory")
    assert megabytes["given_back"] <= megabytes["before"]
    # of five tensors of 64 MB in turn, each takes the place of the one before it, or nearly
    assert megabytes["recorded"] - megabytes["given_back"] <= 2 * 64


def test_a_capture_after_one_that_fails(refused):
    assert refused("captures") == {"same": True, "graphs": 1, "replays": [1], "violations": []}
