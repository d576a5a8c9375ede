"""How chains make their transitions: captured ones equal those made one by one, and notice whatever has changed.

Without a CUDA device the record is the function itself, called again: the tensors it reads and writes, which is all
that can go wrong on our side of a capture, are those of the real one. tests/kernels/test_capture.py has the real one.
"""

import contextlib
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fastanila import MALA, AdjustedAniLA, AniLA, Langevin, noise
from fastanila import graphs as graphs_
from fastanila.models import MLP, GaussianMixture
from fastanila.ops import reference
from fastanila.samplers import captured as captured_samplers
from fastanila.samplers import chain as chain_samplers
from fastanila.samplers import kept as kept_samplers
from fastanila.samplers import stepwise as stepwise_samplers
from fastanila.samplers.captured import Captured
from fastanila.samplers.sampler import Sampler
from fastanila.samplers.state import Info, State, leaves
from fastanila.samplers.stepwise import Stepwise, compiled_transition


class Recorder:
    """Stands in for a CUDA graph: the replay calls the function."""

    def __init__(self):
        self.made = 0

    def __call__(self, function, device):
        self.made += 1
        return function


def start(chains=9, dim=2):
    return torch.randn(chains, dim, generator=torch.Generator().manual_seed(0))


def both(sampler, energy, transition=stepwise_samplers.plain_transition):
    """A captured and a stepwise chain; uncompiled, where it does not matter what the energy reads."""
    advance, recorder = transition(sampler, energy), Recorder()
    return Captured(advance, recorder), Stepwise(advance, sparing=True), recorder


def words(seed, step):
    return noise.as_word64(seed), noise.as_word64(step)


def assert_same(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert torch.equal(x, y)


@pytest.fixture
def frozen():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "sampler",
    [
        AniLA(0.5, 0.1),
        Langevin(0.1, 0.5),
        AniLA(0.5, 0.1, norm="chain", bounds=(-1, 1)),
        AniLA(0.5, 0.1, refresh="update"),
    ],
    ids=str,
)
def test_captured_chains_equal_chains_made_one_by_one(frozen, sampler, monkeypatch):
    monkeypatch.setattr(captured_samplers, "_LONGEST", 8)
    captured, stepwise, recorder = both(sampler, GaussianMixture(torch.eye(2)))
    numbers = sampler.numbers_on(None)
    # 1; 2; 5 + 4; again; 7 + 7 + 6, of which a frozen gain makes the first 7 another graph than the next
    last = 7 if sampler.refresh == "update" else 6
    for count, graphs in ((1, 1), (2, 2), (9, 4), (9, 4), (20, last)):
        got = captured(count, numbers, State(start()), *words(3, 5))
        assert_same(got, stepwise(count, numbers, State(start()), *words(3, 5)))
        assert recorder.made == graphs


class Moving(NamedTuple):
    z: torch.Tensor
    momentum: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Underdamped(Sampler):
    """A sampler whose state is its own."""

    step_size: float | torch.Tensor = 0.1
    is_exact = False
    numbers = ("step_size",)

    def transition(self, evaluate, state, *, seed, step, offset=0, mask=None, statistics=True):
        energy, score = evaluate(state.z)
        before = state.momentum if isinstance(state, Moving) else torch.zeros_like(state.z)
        momentum = 0.5 * before + self.step_size * score + noise.normal(score.shape, seed=seed, step=step)
        after = Moving(state.z + self.step_size * momentum, momentum)
        return after, Info.of(energy, reference.statistics(score, math.inf)) if statistics else None


def test_a_sampler_may_carry_a_state_of_its_own(frozen, monkeypatch):
    monkeypatch.setattr(captured_samplers, "_LONGEST", 4)
    sampler = Underdamped()
    captured, stepwise, recorder = both(sampler, GaussianMixture(torch.eye(2)))
    got = want = State(start())
    for step, graphs in ((0, 2), (9, 3), (18, 3)):  # 3 + 3 + 3 transitions: from z, from their own end, from a Moving
        arguments = sampler.numbers_on(None), words(1, step)
        got, _ = captured(9, arguments[0], got, *arguments[1])
        want, _ = stepwise(9, arguments[0], want, *arguments[1])
        assert isinstance(got, Moving) and recorder.made == graphs
        assert_same(got, want)
    run = sampler.run(GaussianMixture(torch.eye(2)), start(), steps=9, seed=1, compile=False)
    assert torch.equal(run, stepwise(9, sampler.numbers_on(None), State(start()), *words(1, 0))[0].z)


def test_replays_draw_new_noise_and_see_new_numbers(frozen):
    captured, stepwise, recorder = both(AniLA(), GaussianMixture(torch.eye(2)))
    seen = []
    for seed, step, step_size in ((1, 0, 0.1), (1, 5, 0.1), (2, 0, 0.1), (1, 0, 0.2)):
        numbers = AniLA(0.5, step_size).numbers_on(None)
        state, _ = captured(5, numbers, State(start()), *words(seed, step))
        assert_same(state, stepwise(5, numbers, State(start()), *words(seed, step))[0])
        assert not any(torch.equal(state.z, z) for z in seen)
        seen.append(state.z)
    assert recorder.made == 1


def test_a_new_shape_a_mask_and_an_offset_are_captured_anew(frozen):
    captured, stepwise, recorder = both(AniLA(), GaussianMixture(torch.eye(2)))
    numbers = AniLA().numbers_on(None)
    cases = [(9, 0, None), (7, 0, None), (9, 4, None), (9, 0, torch.tensor([True, False])), (9, 0, None)]
    for count, (chains, offset, mask) in enumerate(cases, start=1):
        arguments = (5, numbers, State(start(chains)), *words(1, 2), offset, mask)
        assert_same(captured(*arguments), stepwise(*arguments))
        assert recorder.made == min(count, 4)  # the last is the first again


def test_whatever_the_energy_reads_may_change(frozen, compiler):
    """Parameters in place, without a new capture; anything else a graph could not see, with one."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2), requires_grad=False)
            self.scale = 1.0
            self.plain = torch.ones(1)  # neither a parameter nor a buffer
            self.scalar = torch.ones(())  # on the CPU, so that a GPU takes it by value

        def forward(self, x):
            return self.scale * self.plain * self.scalar * (self.weight * x.square()).sum(-1)

    def half_plain(energy):
        energy.plain = torch.tensor([0.5])

    changes = [
        (lambda e: e.weight.mul_(2), 1),
        (lambda e: setattr(e, "scale", 3.0), 2),
        (lambda e: setattr(e, "weight", nn.Parameter(torch.full((2,), 0.3), requires_grad=False)), 3),
        (half_plain, 4),
        (lambda e: e.scalar.fill_(2.0), 5),
    ]
    energy = Scaled()
    captured, _, recorder = both(AniLA(), energy, compiled_transition)
    numbers, arguments = AniLA(5.0, 0.1).numbers_on(None), (State(start()), *words(1, 2))
    before, _ = captured(5, numbers, *arguments)
    keep = [energy.weight, energy.plain]  # so that no address is used again
    for change, captures in changes:
        change(energy)
        keep += [energy.weight, energy.plain]
        state, _ = captured(5, numbers, *arguments)
        want = AniLA(5.0, 0.1).run(energy, start(), steps=5, seed=1, step=2, compile=False)
        torch.testing.assert_close(state.z, want)
        assert not torch.allclose(state.z, before.z)
        assert recorder.made == captures
        before = state


def test_a_closure_over_another_tensor_is_noticed(frozen, compiler):
    held = {"mean": torch.zeros(2)}
    captured, _, recorder = both(Langevin(), lambda x: 0.5 * (x - held["mean"]).square().sum(-1), compiled_transition)
    numbers, arguments = Langevin(0.1).numbers_on(None), (State(start()), *words(1, 2))
    a, _ = captured(5, numbers, *arguments)
    keep, held["mean"] = held["mean"], torch.ones(2)
    b, _ = captured(5, numbers, *arguments)
    assert recorder.made == 2 and not torch.allclose(a.z, b.z) and keep is not held["mean"]


def test_no_memory_for_a_capture_is_no_reason_to_run_uncaptured(frozen):
    def refuse(function, device):
        raise torch.OutOfMemoryError("out of memory")

    captured = Captured(stepwise_samplers.plain_transition(AniLA(), GaussianMixture(torch.eye(2))), refuse)
    with pytest.raises(torch.OutOfMemoryError):
        captured(7, AniLA().numbers_on(None), State(start()), *words(1, 2))


def test_a_shape_that_cannot_be_captured_leaves_the_others_captured(frozen):
    def refuse_odd(function, device):
        refuse_odd.made += 1
        if refuse_odd.made == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return function

    refuse_odd.made = 0
    captured = Captured(stepwise_samplers.plain_transition(AniLA(), GaussianMixture(torch.eye(2))), refuse_odd)
    for chains in (3, 5):
        arguments = (7, AniLA().numbers_on(None), State(start(chains)), *words(1, 2))
        with contextlib.nullcontext() if refuse_odd.made else pytest.warns(UserWarning, match="uncaptured"):
            captured(*arguments)
    assert sorted(held.works for held in captured.held.values()) == [False, True]


def test_a_compiler_that_fails_is_not_the_energys_fault(frozen, monkeypatch):
    def broken(graph, inputs, config_patches=None):
        raise OSError("no compiler here")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    with pytest.raises(RuntimeError, match=r"the compiler failed on the transition \(.*compile=False runs without it"):
        AniLA().run(GaussianMixture(torch.eye(2)), start(), steps=2, seed=1)


def test_what_cannot_be_captured_runs_uncaptured_and_says_so(frozen, compiler):
    def refuse(function, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    energy = GaussianMixture(torch.eye(2))
    advance = compiled_transition(AniLA(), energy)
    captured, stepwise = Captured(advance, refuse), Stepwise(advance, sparing=True)
    arguments = (7, AniLA().numbers_on(None), State(start()), *words(1, 2))
    with pytest.warns(UserWarning, match=r"the chain runs uncaptured: operation not permitted.* capturing$"):
        got = captured(*arguments)
    assert_same(got, stepwise(*arguments))
    assert_same(captured(*arguments), got)  # and says so once


def test_few_shapes_and_lengths_are_held(frozen):
    captured, _, recorder = both(AniLA(), GaussianMixture(torch.eye(2)))
    for chains in range(1, 8):
        captured(3, AniLA().numbers_on(None), State(start(chains)), *words(1, 2))
    assert len(captured.held) == kept_samplers.SHAPES and recorder.made == 7
    for count in range(2, 10):
        captured(count, AniLA().numbers_on(None), State(start()), *words(1, 2))
    assert max(len(held.graphs) for held in captured.held.values()) == kept_samplers.GRAPHS


def test_a_rehearsal_launches_nothing_and_reads_what_a_run_reads(frozen, compiler):
    advance = compiled_transition(AniLA(), MLP(2, width=8))
    numbers, state, (seed, step) = AniLA().numbers_on(None), State(start()), words(1, 2)

    def read(rehearsing, state):
        with graphs_.watching(rehearsing=rehearsing) as reads:
            after, _ = advance(numbers, state, seed, step, statistics=False)
        return after.z, captured_samplers._beside(reads, (numbers, state, seed, step))

    moved, reads = read(False, state)
    rehearsed, again = read(True, State(start() + 1))
    assert rehearsed is moved and again == reads and len(reads) == 1  # the earlier result: no transition was made
    assert not torch.equal(read(False, State(start() + 1))[0], moved)


def test_threads_take_turns(frozen):
    captured, stepwise, _ = both(AniLA(), GaussianMixture(torch.eye(2)))
    numbers = AniLA().numbers_on(None)

    def run(chain, seed):
        with torch.no_grad():
            return chain(20, numbers, State(start()), *words(seed, 0))[0].z

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: run(captured, seed), range(24)))
    for seed, z in enumerate(together):
        assert torch.equal(z, run(stepwise, seed))


def test_descriptions():
    z, energy = start(), MLP(2, 8)
    assert chain_samplers.describe(AniLA(), energy, z, fused=False) == "cpu: plain definition, eager"
    assert chain_samplers.describe(AniLA(), energy, z, fused=True) == "cpu: compiled reference"


@pytest.mark.parametrize(
    "steps, watched, pieces",
    [(10, [], [10]), (10, [3], [3, 3, 3, 1]), (12, [4, 6], [2] * 6), (5, [100], [5]), (0, [3], []), (1, [1], [1])],
)
def test_pieces(steps, watched, pieces):
    from fastanila.samplers.sampler import _pieces

    assert _pieces(steps, watched) == pieces


def test_the_first_piece_of_an_exact_chain_does_not_undo_the_graphs_of_the_others(frozen, compiler, monkeypatch):
    """It begins without a proposal, which compiles as another graph; once each is captured, runs capture no more."""
    # as on CUDA, where numbers are read at their addresses too
    monkeypatch.setattr(graphs_, "_read", lambda x: x.data_ptr() if isinstance(x, torch.Tensor) else x)
    energy = MLP(2, width=8)
    captured, stepwise, recorder = both(MALA(0.1), energy, compiled_transition)
    numbers = MALA(0.1).numbers_on(None)
    made = []
    for _ in range(3):
        state = want = State(start())
        for piece in range(3):
            state, _ = captured(4, numbers, state, *words(1, 4 * piece))
            want, _ = stepwise(4, numbers, want, *words(1, 4 * piece))
            assert_same(state, want)
        made.append(recorder.made)
    assert made == [2, 2, 2]


# ------------------------------------------------------------------------------------------- how an exact chain begins


@pytest.mark.parametrize(
    "sampler", [MALA(0.3), AdjustedAniLA(1.5, 0.3), AdjustedAniLA(1.5, 0.3, norm="chain")], ids=str
)
@pytest.mark.parametrize("step", [0, 7, (1 << 32) - 1, 1 << 32])
def test_a_chain_begun_by_a_transition_is_the_chain(sampler, step):
    """The transition ahead of the first leads to the start, its energy, score and first proposal: steps wrap at 0."""
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

    def energy(x):
        return torch.where(x[:, 0] > 2.5, math.inf, x.square().sum(1) + x.sin().sum(1))

    z[2, 0] = 3.0  # no finite energy: that chain stays
    advance = stepwise_samplers.plain_transition(sampler, energy)
    mask = torch.tensor([True, True, False])
    for count, kept in ((1, None), (5, None), (5, mask)):
        arguments = (count, sampler.numbers_on(z.device), State(z), torch.tensor(3), torch.tensor(step), 11, kept)
        want, seen = Stepwise(advance, sparing=False)(*arguments)
        got, info = Stepwise(advance, sparing=False, begins=sampler)(*arguments)
        moved = torch.arange(6) != 2
        for one, other in zip(got, want, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one[moved], other[moved], rtol=1e-5, atol=1e-5)
        assert torch.equal(got.z[2], z[2]) and torch.equal(want.z[2], z[2])
        assert info.acceptance[2] == 0 and got.energy[2] == math.inf
        torch.testing.assert_close(info.acceptance[moved], seen.acceptance[moved], rtol=1e-4, atol=1e-5)


def test_a_chain_that_goes_on_begins_with_nothing_new():
    sampler = AdjustedAniLA(1.5, 0.3)
    calls = []
    plain = stepwise_samplers.plain_transition(sampler, lambda x: x.square().sum(1))

    def advance(*arguments):
        calls.append(int(arguments[3]))
        return plain(*arguments)

    chain = Stepwise(advance, sparing=False, begins=sampler)
    z, numbers, seed = torch.randn(4, 2), sampler.numbers_on(torch.device("cpu")), torch.tensor(1)
    state, _ = chain(2, numbers, State(z), seed, torch.tensor(0))
    state, _ = chain(2, numbers, state, seed, torch.tensor(2))
    chain(1, numbers, state._replace(proposal=None), seed, torch.tensor(4))  # as `adapt` does
    assert calls == [-1, 0, 1, 2, 3, 4]
