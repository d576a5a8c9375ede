"""Whatever state torch is in where fastanila is called: its modes, its default dtype and its default device."""

import contextlib

import pytest
import torch

from fastanila import HMC, MALA, AniLA, calibrate, data, generate, ops
from fastanila.evaluation import plane
from fastanila.models import MLP, ConvNet, GaussianMixture, vae
from fastanila.models.score import evaluator
from fastanila.training import loop, run
from fastanila.training.settings import Settings


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


#: A factory call that names no device makes garbage of no memory on "meta", whatever device the machine has.
STATES = {
    "inference mode": lambda: torch.inference_mode(),
    "no grad": lambda: torch.no_grad(),
    "float64": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),
}
every_state = pytest.mark.parametrize("state", STATES)


def start(chains=9):
    return torch.randn(chains, 2, generator=torch.Generator().manual_seed(0))


def quadratic(x):
    return 0.5 * x.square().sum(1)


@every_state
@pytest.mark.parametrize("sampler", [AniLA(0.5, 0.1), MALA(0.1), HMC(0.1, 2)], ids=str)
def test_samplers_and_calibration(sampler, state):
    energy, z = MLP(2, 8, features=3), start()
    wanted = sampler.run(energy, z, steps=3, seed=0, compile=False, keep_every=2), calibrate(energy, z)
    with STATES[state]():
        assert torch.equal(sampler.run(energy, z, steps=3, seed=0, compile=False, keep_every=2), wanted[0])
        assert calibrate(energy, z) == wanted[1] and sampler.calibrate(energy, z).step_size == wanted[1].step_size
        if sampler.is_exact:
            adapted = sampler.adapt(energy, z, steps=2, seed=0, compile=False)
        u, score = evaluator(quadratic)(z)
    assert torch.equal(score, -z) and torch.equal(u, quadratic(z)) and energy.layers[0].weight.requires_grad
    if sampler.is_exact:
        assert adapted == sampler.adapt(energy, z, steps=2, seed=0, compile=False)._replace(z=adapted.z)


@every_state
def test_a_compiled_run(state, graphs):
    z = start()
    with STATES[state]():
        made = AniLA(0.5, 0.1).run(quadratic, z, steps=2, seed=0)
    torch.testing.assert_close(made, AniLA(0.5, 0.1).run(quadratic, z, steps=2, seed=0, compile=False))
    assert graphs


def test_a_compiled_run_on_tensors_made_in_inference_mode(graphs):
    """Which the compiler differentiates through, where autograd does not."""
    with torch.inference_mode():
        z, weight = start(), torch.ones(2)
        made = MALA(0.1).run(lambda x: (weight * x).square().sum(1) / 2, z, steps=2, seed=0)
    assert graphs
    torch.testing.assert_close(made, MALA(0.1).run(quadratic, start(), steps=2, seed=0, compile=False))


def test_chains_made_in_inference_mode():
    with torch.inference_mode():
        z, mask = start(), torch.tensor([True, False])
    for sampler in (AniLA(0.5, 0.1), MALA(0.1), HMC(0.1, 2)):
        made = sampler.run(quadratic, z, steps=2, seed=0, mask=mask, compile=False)
        assert torch.equal(made, sampler.run(quadratic, start(), steps=2, seed=0, mask=mask, compile=False))
        assert not made.is_inference()
    assert calibrate(quadratic, z) == calibrate(quadratic, start())
    moved = ops.anisotropic_step(z, z, 1.0, seed=0, step=0)
    assert torch.equal(moved, ops.anisotropic_step(start(), start(), 1.0, seed=0, step=0))


@pytest.mark.parametrize("outside", [True, False])
def test_a_model_made_in_inference_mode_is_named(outside):
    with torch.inference_mode():
        model, weight = MLP(2, 8), torch.ones(2)
    message = r"energy must not read tensors made under torch.inference_mode\(\).*give it clones"
    with contextlib.nullcontext() if outside else torch.inference_mode():
        for energy in (model, lambda x: (weight * x).square().sum(1)):
            with pytest.raises(ValueError, match=message):
                AniLA().run(energy, start(), steps=1, seed=0, compile=False)
    assert model.training and all(p.requires_grad for p in model.parameters())


@every_state
def test_networks_are_float32_and_the_same(state):
    def made():
        torch.manual_seed(0)
        energies = MLP(2, 8, features=3), ConvNet(1, 8, 2)
        networks = *energies, vae.of_vectors(2, 3, 4, features=2), vae.of_images(1, 8, 3, 2)
        return [t for network in networks for t in network.state_dict().values()]

    wanted = made()
    with STATES[state]():
        got = made()
    assert all(t.dtype == torch.float32 for t in got)
    assert all(t.device.type == ("meta" if state == "device" else "cpu") for t in got)  # as torch's own layers
    if state != "device":
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_mixture_takes_its_means_dtype_and_device():
    means = start(3)
    with torch.device("meta"), default_dtype(torch.float64):
        energy = GaussianMixture(means, sd=0.5)
        draws_ = energy.sample(4, seed=0)
    assert torch.equal(draws_, GaussianMixture(means, sd=0.5).sample(4, seed=0)) and draws_.dtype == torch.float32


SETTINGS = {
    "rings": dict(data="rings", chains=32),
    "vae": dict(data="25gaussians", init="vae", vae_warm_up=1, latent=3),
    "digits": dict(data="digits", chains=32, width=2),
    "completion": dict(data="digits", task="completion", mask="centre", width=2, vae_width=2, latent=3, vae_warm_up=1),
}


def trained(directory, name):
    common = dict(batch_size=16, iterations=2, steps=2, fused=False, sample_every=0, device="cpu", out=str(directory))
    loop.train(Settings(**common | SETTINGS[name]), say=lambda line: None)
    return run.load(directory, "cpu")


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    made = {}

    def found(name):
        if name not in made:
            made[name] = trained(tmp_path_factory.mktemp("ordinary") / name, name)
        return made[name]

    return found


@every_state
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_trained_and_loaded_the_same(name, state, ordinary, tmp_path):
    wanted = ordinary(name)
    with STATES[state]():
        got = trained(tmp_path / "run", name)
        parts = [got.energy, *([] if got.vae is None else [got.vae])]
        if name in ("rings", "vae"):
            drawn = generate.sample(got, 5, seed=1, fused=False)
            assert torch.equal(drawn, generate.sample(wanted, 5, seed=1, fused=False))
    assert torch.equal(got.chains, wanted.chains) and not got.chains.is_inference()
    for part, other in zip(parts, [wanted.energy, wanted.vae], strict=False):
        for (key, a), (_, b) in zip(part.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(a, b), key
            assert not a.is_inference()


@every_state
def test_data_and_evaluation(state):
    density, digits = data.load("25gaussians"), data.load("digits")
    model = GaussianMixture(density.modes.centres, density.modes.sd)
    with STATES[state]():
        assert torch.equal(data.load("digits").train, digits.train)
        drawn = data.load("swiss-roll").draw(5, seed=0, step=0, device="cpu")
        found = plane.evaluate(model, density, model.sample(200, seed=0), resolution=60)
    assert drawn.dtype == torch.float32 and drawn.device.type == "cpu"
    assert found == plane.evaluate(model, density, model.sample(200, seed=0), resolution=60)
