"""The warm-up by matching: its loss by its definition, its place in a run, and what it teaches."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from fastanila import generate
from fastanila.noise import Stream, uniform
from fastanila.training import config, job, loop, update
from fastanila.training.learner import Schedule
from fastanila.training.matching import LAST, LEAST, SPEED, matching
from fastanila.training.settings import Settings


class Quartic(nn.Module):
    """U = a sum x^4 / 4, whose gradient is a x^3."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x):
        return self.a * x.pow(4).flatten(1).sum(1) / 4


@pytest.mark.parametrize("shape", [(5, 3), (3, 1, 7, 5)])
def test_the_loss_is_its_definition(shape):
    g = torch.Generator().manual_seed(3)
    data, begins = (2 * torch.rand(shape, generator=g, dtype=torch.float64) - 1 for _ in range(2))
    times = torch.rand((shape[0], *[1] * (len(shape) - 1)), generator=g, dtype=torch.float64)
    times.view(-1)[:2] = torch.tensor([0.95, 0.99])  # within the last share, and so near that the weight is at its most
    energy, step_size = Quartic(1.7), 0.3
    squares = []
    for d, e, t in zip(data, begins, times.flatten().tolist(), strict=True):
        for a, b in zip(d.flatten().tolist(), e.flatten().tolist(), strict=True):
            gradient = 1.7 * (t * a + (1 - t) * b) ** 3
            share = min(1.0, (1 - t) / LAST)
            wanted = 2 * SPEED / step_size * share * (b - a)
            squares.append(((gradient - wanted) * step_size / (2 * SPEED)) ** 2 / max(LEAST, share))
    loss = matching(energy, data, begins, times, step_size)
    assert loss.item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)
    (slope,) = torch.autograd.grad(loss, energy.a)
    near = [matching(Quartic(1.7 + h), data, begins, times, step_size).item() for h in (1e-6, -1e-6)]
    assert slope.item() == pytest.approx((near[0] - near[1]) / 2e-6, rel=1e-6)


def settings(tmp_path, **own):
    usual = dict(
        data="digits", width=4, chains=64, batch_size=32, steps=3, iterations=6, matching=3, activation="silu",
        fused=False, log_every=1, save_every=1, sample_every=0, out=str(tmp_path / "run"), device="cpu",
    )  # fmt: skip
    return Settings(**usual | own)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_chains_take_over_where_the_warm_up_ends(tmp_path):
    prepared = job.prepare(settings(tmp_path, matching_weight=0.5))
    before = prepared.start.chains.clone()
    made = update.build_update(prepared, matches=True)()
    assert made.info is None and made.matching.item() > 0
    assert torch.equal(prepared.start.chains, before)
    loop.run(prepared)
    logged = rows(tmp_path / "run")
    assert ["clip_fraction" in row for row in logged] == [False] * 3 + [True] * 3
    assert all("matching" in row for row in logged)
    assert not torch.equal(prepared.start.chains, before)


def test_the_warm_up_tells_the_energies_of_an_eighth_of_its_data_and_of_the_noise(tmp_path):
    prepared = job.prepare(settings(tmp_path, batch_size=20, chains=40, data_noise=0.0))
    energy = copy.deepcopy(prepared.ebm.module).double()
    made = update.build_update(prepared, matches=True)()
    data = update.draw_data(prepared, 0, prepared.seed)[0][:3]
    for told, states in ((made.energy_data, data), (made.energy_chains, prepared.start.draw(0)[:3])):
        assert told.item() == pytest.approx(energy(states.double()).mean().item(), rel=1e-5, abs=1e-6)
    assert abs(made.energy_data.item() - made.energy_chains.item()) > 1e-4  # a swap would show


def test_a_run_resumed_in_its_warm_up_is_the_run_in_one_go(tmp_path):
    whole = loop.train(settings(tmp_path / "a", matching_weight=1.0, flips=True))
    cut = settings(tmp_path / "b", matching_weight=1.0, flips=True)
    checkpoints = tmp_path / "b" / "run" / "checkpoints"

    def stop(path):
        if path.stem.endswith("2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(cut, on_checkpoint=stop)
    assert max(path.stem for path in checkpoints.glob("*.safetensors")).endswith("2")
    again = loop.train(cut, resume=tmp_path / "b" / "run")
    for a, b in zip(whole.energy.parameters(), again.energy.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.chains, again.chains)


def test_a_rollback_into_the_warm_up_matches_again(tmp_path, monkeypatch):
    """Of a run that was past its warm-up when it began to make updates, as a resumed one is."""
    prepared, calls = job.prepare(settings(tmp_path)), []
    prepared.iteration = 4
    prepared.made.fill_(4)

    def recorded(job_, matches=False):
        real = update.build_update(job_, matches=matches)

        def made():
            calls.append((matches, int(job_.made)))
            if len(calls) == 1:
                job_.broken.fill_(True)
            return real()

        return made

    def back(job_, diverged):
        job_.iteration = 1
        job_.made.fill_(1)
        job_.broken.fill_(False)
        return "back"

    monkeypatch.setattr(loop, "build_update", recorded)
    monkeypatch.setattr(loop, "roll_back", back)
    loop.run(prepared)
    assert calls == [(False, 4), (True, 1), (True, 2), (False, 3), (False, 4), (False, 5)]


def test_the_score_leads_to_the_data(tmp_path):
    """After 60 updates the drift from noise points to the data: its cosine with the way there is far above that of the
    energy that has not learned, a mutant."""

    def cosine(run):
        data = prepared.data.draw(256, seed=9, step=0, purpose="held-out")
        begins = 2 * torch.rand(data.shape, generator=torch.Generator().manual_seed(1)) - 1
        x = torch.lerp(begins, data, 0.5).requires_grad_()
        (gradient,) = torch.autograd.grad(run(x).sum(), x)
        return nn.functional.cosine_similarity(gradient.flatten(1), (begins - data).flatten(1)).mean().item()

    prepared = job.prepare(settings(tmp_path, width=8, matching=60, iterations=61, log_every=100, save_every=100))
    before = cosine(prepared.ebm.module)
    learn = update.build_update(prepared, matches=True)
    for _ in range(60):
        learn()
    assert cosine(prepared.ebm.module) > 0.5 > 0.2 > before


def test_flips_mirror_every_other_image(tmp_path):
    plain, flipped = (job.prepare(settings(tmp_path, flips=flips, data_noise=0.0)) for flips in (False, True))
    x, y = (update.draw_data(job_, 5, 7)[0] for job_ in (plain, flipped))
    mirrored = uniform((32,), seed=7, step=5, stream=Stream.FLIPS) <= 0.5
    assert 0 < mirrored.sum() < 32
    for a, b, m in zip(x, y, mirrored, strict=True):
        assert torch.equal(b, a.flip(-1) if m else a)


@pytest.mark.parametrize("tensors", [False, True])
def test_each_phase_has_its_learning_rate(tensors):
    rate = Schedule(1e-4, "linear", 10, matching=4, matching_lr=1e-3)
    rate = rate.on(torch.device("cpu")) if tensors else rate
    steps = [torch.tensor(i) if tensors else i for i in range(10)]
    wanted = [1e-3, 7.5e-4, 5e-4, 2.5e-4, *(1e-4 * (1 - i / 6) for i in range(6))]
    assert [float(rate.at(i)) for i in steps] == pytest.approx(wanted, rel=1e-6)
    assert [float(Schedule(1e-4, "none", 10).at(i)) for i in (0, 9)] == [1e-4, 1e-4]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (dict(matching=6), "matching must be below iterations"),
        (dict(matching=-1), "matching must be"),
        (dict(matching_weight=-0.5), "matching_weight must be"),
        (dict(matching_lr=0.0), "matching_lr must be"),
        (dict(init="vae"), "matching and matching_weight must be 0 with init=vae"),
        (dict(data="rings", width=None, activation=None, flips=True, matching=0), "flips must be false for rings"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, own, words):
    with pytest.raises(ValueError, match=words):
        config.resolve(dataclasses.replace(settings(tmp_path), **own, **({"chains": None} if "init" in own else {})))


def test_a_descent_is_gradient_descent_on_the_average(tmp_path):
    run = loop.train(settings(tmp_path, matching=0, iterations=2))
    z = run.chains[:5]
    by_hand = z.clone()
    for _ in range(3):
        x = by_hand.requires_grad_()
        (gradient,) = torch.autograd.grad(run.energy(x).sum(), x)
        by_hand = (x.detach() - run.sampler.step_size / 2 * gradient).clamp(-1, 1)
    torch.testing.assert_close(generate.descended(run, z, 3, fused=False), by_hand)
    assert generate.descended(run, z, 0) is z
