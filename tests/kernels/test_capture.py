"""Real CUDA graphs: what they replay equals what runs uncaptured. tests/test_transitions.py has the logic on a CPU."""

import math
import warnings

import pytest
import torch

from fastanila import AdjustedAniLA, AniLA, Langevin, ReplicaExchange
from fastanila.models import MLP, ConvNet, GaussianMixture, UNet
from fastanila.models.wrappers import Autocast
from fastanila.samplers import chain, whole_chain
from fastanila.samplers import stepwise as stepwise_samplers
from fastanila.training import update as update_training
from fastanila.training.job import prepare
from fastanila.training.settings import Settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, and an interpreter captures nothing"),
]


@pytest.fixture(autouse=True)
def stepwise(monkeypatch):
    """Whole-chain kernels off: this is about graphs."""
    monkeypatch.setattr(whole_chain, "_fitting", lambda *a: "this is about graphs")


@pytest.fixture
def captures(monkeypatch):
    made = []
    graph = torch.cuda.CUDAGraph

    class Counted(graph):
        def capture_end(self):
            made.append(1)
            return super().capture_end()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    return made


def start(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).cuda()


ENERGIES = {
    "mixture": (lambda: GaussianMixture(torch.eye(2)), (65, 2)),
    "mlp": (lambda: MLP(2, width=32, features=16), (65, 2)),
    "convnet": (lambda: ConvNet(3, 16, 8), (5, 3, 16, 16)),
    "unet": (lambda: UNet(3, 16, 8), (5, 3, 16, 16)),
    "bf16": (lambda: Autocast(ConvNet(3, 16, 8)), (5, 3, 16, 16)),
}


@pytest.mark.parametrize("sampler", [AniLA(0.5, 0.1), Langevin(0.1), AniLA(0.5, 0.1, refresh="update")], ids=str)
@pytest.mark.parametrize("name", ENERGIES)
def test_a_captured_run_equals_the_transitions_one_by_one(name, sampler, captures, monkeypatch):
    build, shape = ENERGIES[name]
    torch.manual_seed(0)
    energy, z = build().cuda(), start(*shape)
    captured = sampler.run(energy, z, steps=21, seed=1, step=4)
    again = sampler.run(energy, z, steps=21, seed=1, step=25)
    assert len(captures) == 1  # the second replays the first one's
    monkeypatch.setattr(chain, "Captured", lambda t, **_: stepwise_samplers.Stepwise(t, sparing=True))
    close = dict(rtol=1e-4, atol=1e-4) if name != "bf16" else dict(rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(captured, sampler.run(energy, z, steps=21, seed=1, step=4), **close)
    torch.testing.assert_close(again, sampler.run(energy, z, steps=21, seed=1, step=25), **close)
    assert not torch.allclose(captured, again)


def test_captured_replicas_equal_those_on_the_cpu(captures):
    """But for a chain whose acceptance or exchange is decided by the last bit."""
    energy, z = MLP(2, width=32, features=16).cuda(), start(65, 2)
    replicas = ReplicaExchange.of(AdjustedAniLA(2.0, 0.2), replicas=5, highest=9.0)
    ends = [replicas.run(energy, z, steps=21, seed=1, step=step) for step in (4, 25)]
    assert len(captures) == 1  # the second replays the first one's
    for step, end in zip((4, 25), ends, strict=True):
        want = replicas.run(energy.cpu(), z.cpu(), steps=21, seed=1, step=step, compile=False)
        assert torch.isclose(end.cpu(), want, rtol=1e-3, atol=1e-3).all(1).float().mean() > 0.9


def test_schedules_parameters_and_shapes_reach_the_replays(captures):
    energy, z = MLP(2, width=16).cuda(), start(33, 2)

    def both(sampler, z):
        fused, plain = (sampler.run(energy, z, steps=9, seed=1, compile=c) for c in (True, False))
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
        return fused

    a = both(AniLA(0.5, 0.1), z)
    b = both(AniLA(0.25, 0.2), z)
    with torch.no_grad():
        for p in energy.parameters():
            p.mul_(2)
    c = both(AniLA(0.25, 0.2), z)
    assert len(captures) == 1 and not torch.allclose(a, b) and not torch.allclose(b, c)
    both(AniLA(0.25, 0.2), z[:7])
    assert len(captures) == 2


def test_callbacks_and_thinning_see_the_uncaptured_states():
    energy, z, infos = GaussianMixture(torch.eye(2)).cuda(), start(17, 2), ([], [])
    kept = [
        AniLA(0.5, 0.1).run(
            energy, z, steps=24, seed=1, keep_every=6, callback=seen.append, callback_every=8, compile=c
        )
        for c, seen in zip((True, False), infos, strict=True)
    ]
    torch.testing.assert_close(*kept, rtol=1e-4, atol=1e-4)
    for a, b in zip(*infos, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_an_energy_that_synchronises_runs_uncaptured_and_says_so():
    @torch.library.custom_op("fastanila_test::waits", mutates_args=())
    def waits(x: torch.Tensor) -> torch.Tensor:
        return x * (1.0 + 0.0 * x.sum().item())

    waits.register_fake(torch.empty_like)

    def score(x):
        return -waits(x)

    z = start(5, 2)
    with pytest.warns(UserWarning, match="the chain runs uncaptured"):
        got = Langevin(0.1).run(None, z, score=score, steps=5, seed=1)
    torch.testing.assert_close(got, Langevin(0.1).run(None, z, score=torch.neg, steps=5, seed=1, compile=False))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(init="noise", energy_l2=0.1, data_noise=0.1, clip_grad=0.1, refresh="update", norm="chain"),
        dict(sampler="anila-mh", threshold=1.0),
        dict(sampler="hmc", leapfrog_steps=3),
        dict(data="digits", energy="convnet", width=8, features=0, clip_grad=1.0),
        dict(data="digits", energy="convnet", width=8, features=0, precision="bf16"),
        dict(init="vae", vae_width=16, vae_warm_up=2),
        dict(init="vae", task="completion", mask="blocks", data="digits", width=8, features=0, vae_width=8, latent=4),
    ],
    ids=str,
)
def test_a_captured_update_equals_the_uncaptured_one(options, captures, monkeypatch):
    common = dict(sampler="anila", steps=4, batch_size=32, chains=32, width=16, features=8, iterations=50, seed=3)
    ends = []
    for warm_up in (3, math.inf):
        monkeypatch.setattr(update_training, "WARM_UP", warm_up)
        job = prepare(Settings(**common | options, device="cuda"))
        update = update_training.build_update(job)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*uncaptured")
            rows = [numbers(update()) for _ in range(8)]
        assert job.made.item() == 8 and not job.broken.item()
        parameters = [p.detach().clone() for learner in job.learners for p in learner.model.parameters()]
        ends.append((rows, parameters, job.chains.clone()))
    assert len(captures) == 1
    loose = options.get("precision") == "bf16"
    (rows_a, parameters_a, chains_a), (rows_b, parameters_b, chains_b) = ends
    torch.testing.assert_close(torch.tensor(rows_a), torch.tensor(rows_b), rtol=0.05 if loose else 1e-3, atol=1e-3)
    torch.testing.assert_close(parameters_a, parameters_b, rtol=1e-2 if loose else 1e-3, atol=1e-3)
    if not loose:
        torch.testing.assert_close(chains_a, chains_b, rtol=1e-3, atol=1e-3)
    assert len({tuple(row) for row in rows_a}) == 8  # every replay sees new data and new noise


def numbers(made: update_training.Update) -> list[float]:
    return [x.item() for x in (made.energy_data, made.energy_chains, *made.grad_norms, *(made.teaching or ()))]


def test_a_broken_update_changes_nothing_when_replayed():
    sizes = dict(steps=2, batch_size=16, chains=16, width=16, features=8, iterations=50)
    job = prepare(Settings(sampler="anila", **sizes, device="cuda"))
    update = update_training.build_update(job)
    for _ in range(6):
        update()
    job.start.chains.fill_(math.inf)
    before = [p.detach().clone() for p in (*job.ebm.module.parameters(), *job.ebm.average.parameters())]
    for _ in range(3):
        update()
    assert job.broken.item() and job.made.item() == 6
    after = (*job.ebm.module.parameters(), *job.ebm.average.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
