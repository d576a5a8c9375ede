"""Training whose chains are replicas at several temperatures, and samples of such runs."""

import math

import numpy as np
import pytest
import torch

import fastanila
from fastanila import ReplicaExchange, sample
from fastanila import train as command
from fastanila.training import build, checkpoint, config, job, loop, update
from fastanila.training.settings import Settings

SMALL = dict(
    data="8gaussians", replicas=3, highest=9.0, iterations=6, chains=32, batch_size=16, width=16, depth=1, features=8,
    steps=3, log_every=1, sample_every=0, save_every=3, fused=False,
)  # fmt: skip


def quiet(settings, **more):
    return loop.train(settings, say=lambda text: None, **more)


def final(directory):
    return checkpoint.load_latest(directory / "checkpoints")[0]


@pytest.fixture
def run(tmp_path):
    return quiet(Settings(**SMALL, out=str(tmp_path / "run")))


def test_an_update_moves_all_replicas_and_learns_from_the_cold_ones():
    one = job.prepare(Settings(**SMALL, out="unused"))
    energy = one.ebm.module
    for made in (0, 1, 2):  # the second turns to the other half of the chains, the third comes back to the first
        rows = (torch.arange(3)[:, None] * 32 + made % 2 * 16 + torch.arange(16)).flatten()
        begin = one.start.chains[rows].clone()
        exchange = ReplicaExchange.of(one.sampler, replicas=3, highest=9.0)
        want = exchange.run(energy, begin, steps=3, seed=0, step=3 * made, compile=False)
        with torch.no_grad():
            means = [energy(z).mean() for z in (want[:16], want)]
        done = update.build_update(one)()
        torch.testing.assert_close(one.start.chains[rows], want)
        torch.testing.assert_close(one.chains, want[:16])
        torch.testing.assert_close(done.energy_chains, means[0])
        assert abs(done.energy_chains - means[1]) > 1e-3  # nor do all of them teach
        assert done.info.acceptance.shape == (16,)


def test_a_run_has_its_cold_chains_and_keeps_all(run, tmp_path):
    assert run.chains.shape == (32, 2) and run.chains.isfinite().all()
    population = final(tmp_path / "run")["start.population"]
    assert population.shape == (96, 2) and torch.equal(population[:32], run.chains)
    assert type(run.sampler) is fastanila.AdjustedAniLA
    assert config.resolve(Settings(**SMALL)).reinit == 0 != config.resolve(Settings(**SMALL | dict(replicas=1))).reinit


def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(run, tmp_path):
    (tmp_path / "run" / "checkpoints" / "00000006.safetensors").rename(tmp_path / "whole.safetensors")
    quiet(Settings(**SMALL), resume=tmp_path / "run")
    whole, _ = checkpoint.load(tmp_path / "whole.safetensors")
    again = final(tmp_path / "run")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_fused_and_plain_give_the_same_numbers(graphs, tmp_path):
    ends = [quiet(Settings(**SMALL | dict(fused=fused), out=str(tmp_path / str(fused)))) for fused in (False, True)]
    torch.testing.assert_close(ends[1].chains, ends[0].chains, rtol=1e-3, atol=1e-3)


def test_sample_moves_replicas_and_returns_the_cold_ones(run, tmp_path, capsys):
    z = fastanila.generate.sample(run, 40, steps=4, fused=False, seed=1)
    exchange = ReplicaExchange.of(run.sampler, replicas=3, highest=9.0)
    start = exchange.start(run.chains[torch.arange(40) % 32])
    how = dict(steps=4, seed=1, step=6 * 3, compile=False)
    assert torch.equal(z, exchange.cold(exchange.run(run.energy, start, **how)))
    alone = fastanila.generate.sample(run, 40, steps=4, fused=False, seed=1, replicas=1)
    assert torch.equal(alone, run.sampler.run(run.energy, start[:40], **how)) and not torch.equal(z, alone)
    out = tmp_path / "s.npz"
    line = [str(tmp_path / "run"), "--out", str(out), "--no-fused", "--count", "10", "--steps", "3", "--warm-up", "8"]
    assert sample.main([*line, "--replicas", "4", "--highest", "5"]) == 0
    assert np.load(out)["samples"].shape == (10, 2)
    capsys.readouterr()
    for more, message in (
        (["--replicas", "0"], "replicas must be an integer of at least 1, got 0"),
        (["--replicas", "1", "--highest", "5"], "highest has no effect without replicas: it needs replicas above 1"),
        (["--highest", "1"], "highest must be above 1, the temperature of the cold chains, got 1.0"),
        (["--sampler", "anila", "--warm-up", "0", "--replicas", "2"], "sampler must be MALA, AdjustedAniLA or HMC"),
    ):
        assert sample.main([*line, *more]) == 2
        assert message in capsys.readouterr().err


def test_what_cannot_be_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags, message in (
        ("--replicas 0", "replicas must be an integer of at least 1, got 0"),
        ("--replicas 2 --highest 1", "highest must be above 1, the temperature of the cold chains, got 1"),
        ("--replicas 2 --highest inf", "highest must be above 1, the temperature of the cold chains, got inf"),
        ("--replicas 2 --sampler anila", "replicas must be 1 with sampler=anila"),
        ("--replicas 2 --init noise", "replicas must be 1 with init=noise, got 2: they need persistent"),
        ("--highest 5", "highest has no effect with replicas=1: it needs replicas above 1"),
    ):
        assert command.main(flags.split()) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="replicas must be 1 with classes=True"):
        config.resolve(Settings(data="digits", classes=True, sampler="mala", replicas=2))
    assert build.with_replicas(one := fastanila.MALA(), config.resolve(Settings(replicas=1))) is one
    assert not math.isinf(config.resolve(Settings(replicas=2)).highest)
