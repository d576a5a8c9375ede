"""States that carry their class, where chains start with one, and the energies of each."""

import math

import numpy as np
import pytest
import torch

from fastanila import data
from fastanila.data import classes
from fastanila.data.images import Images
from fastanila.models import ConvNet, wrappers
from fastanila.models.score import evaluator
from fastanila.ops import reference
from fastanila.samplers import AniLA, Langevin, starts
from fastanila.training import losses

Z_BOUND = 5.1  # standard errors: a false alarm of 1e-6 over three comparisons


def test_states_hold_their_class():
    x, y = torch.rand(3, 2, 8, 8), torch.tensor([4, 0, 1 << 23])
    z = classes.state(x, y)
    assert z.shape == (3, 3, 8, 8) and torch.equal(classes.images(z), x)
    assert torch.equal(classes.labels(z), y) and classes.labels(z).dtype == torch.int64
    assert (z[:, 2] == y[:, None, None]).all()
    free = classes.free(z)
    assert free.dtype == torch.bool and free[:, :2].all() and not free[:, 2].any()


@pytest.mark.parametrize("norm", ["element", "channel", "chain"])
def test_statistics_are_of_what_may_move(norm):
    """A threshold below every score that there is, and one above: all clipped, none clipped."""
    z = classes.state(torch.rand(3, 2, 5, 5), torch.tensor([0, 2, 1]))
    score = torch.where(classes.free(z), 2.0, 0.0)
    for threshold, clipped in ((1e-3, 1.0), (1e3, 0.0)):
        gain = reference.gain(score, threshold, norm).expand_as(score)
        assert (gain < 1).float().mean() / classes.share(z, norm) == pytest.approx(clipped)
    assert (score.square().mean() / classes.share(z, "element")).sqrt() == pytest.approx(2.0)


def test_labelled_images_are_a_data_set():
    images = data.load("digits")
    states = classes.ByClass(images)
    assert states.shape == (2, 8, 8) and states.count == 10
    assert states.box == images.box and states.name == "digits"
    for purpose, labels, pixels in (
        ("train", images.train_labels, images.train),
        ("start", images.train_labels, images.train),
        ("held-out", images.held_out_labels, images.held_out),
    ):
        drawn = states.draw(9, seed=3, step=5, purpose=purpose)
        assert torch.equal(classes.images(drawn), images.draw(9, seed=3, step=5, purpose=purpose))
        levels = ((classes.images(drawn) + 1) * 127.5).round().to(torch.uint8)
        rows = [(pixels == level).flatten(1).all(1).nonzero()[0, 0] for level in levels]
        assert torch.equal(classes.labels(drawn), labels[torch.stack(rows)])  # each its own
        assert torch.equal(states.draw(2, seed=3, step=5, purpose=purpose, offset=7), drawn[7:])
    relabelled = Images(
        "digits", images.train, images.held_out, images.box, images.train_labels + 1, images.held_out_labels
    )
    before, now = states.fingerprint, classes.ByClass(relabelled).fingerprint
    assert data.images.changes(before, now) == ["as many training images, but not the same"]
    assert not data.images.changes(before, classes.ByClass(images).fingerprint)


def test_images_without_classes_are_refused():
    pixels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="classes need images with labels, and those of x have none"):
        classes.ByClass(Images("x", pixels, pixels))
    zeros = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="classes must be at least 2, and all images of x are of one"):
        classes.ByClass(Images("x", pixels, pixels, train_labels=zeros, held_out_labels=zeros))


# ------------------------------------------------------------------------------------------------------------- energies


class Wells(torch.nn.Module):
    """U(x, y) = |x - mean_y|^2 / 2 of images of one pixel, for three classes."""

    means = torch.tensor([-3.0, 0.0, 4.0])

    def forward(self, x):
        return 0.5 * (x.flatten(1) - self.means).square()


def test_a_class_energy_is_its_networks_of_that_class():
    network = ConvNet(2, 8, 4, outputs=3)
    energy, x, y = wrappers.ClassEnergy(network, 3), torch.rand(5, 2, 8, 8), torch.tensor([2, 0, 1, 1, 2])
    z, each = classes.state(x, y), network(x)
    assert each.shape == (5, 3) and torch.equal(energy(z), each[torch.arange(5), y])
    assert torch.equal(energy(z, every_class=True), each) and torch.equal(wrappers.energies_by_class(energy, x), each)
    expected = -np.log(np.exp(-each.detach().double().numpy()).sum(1))
    np.testing.assert_allclose(wrappers.marginal(energy)(x).detach(), expected, rtol=1e-6)
    halved = wrappers.Tempered(energy, 2.0)
    torch.testing.assert_close(halved(z, every_class=True), each / 2)
    for traced in (False, True):
        u, score = evaluator(energy, traced=traced)(z)
        expected = torch.func.grad(lambda x: -network(x)[torch.arange(5), y].sum())(x)
        assert torch.equal(u, energy(z)) and torch.allclose(score[:, :2], expected, atol=1e-7)
        assert (score[:, 2] == 0).all()
    with pytest.raises(ValueError, match=r"an energy for each of 4 classes, \(5, 4\), got \(5, 3\)"):
        wrappers.ClassEnergy(network, 4)(z)


@pytest.mark.parametrize("size, confinement", [(8, 0.0), (19, 0.5)])
def test_each_output_of_a_network_is_one_of_a_networks_with_one(size, confinement):
    several = ConvNet(1, size, 4, outputs=3, confinement=confinement)
    x = torch.rand(2, 1, size, size)
    for i in range(3):
        one = ConvNet(1, size, 4, confinement=confinement)
        one.layers.load_state_dict(several.layers.state_dict())
        one.head.load_state_dict({name: p[i : i + 1] for name, p in several.head.state_dict().items()})
        torch.testing.assert_close(several(x)[:, i], one(x), rtol=1e-5, atol=1e-5)


def test_autocast_keeps_the_energies_float32():
    energy = wrappers.Autocast(wrappers.ClassEnergy(ConvNet(1, 8, 4, outputs=3), 3))
    z = classes.state(torch.rand(2, 1, 8, 8), torch.tensor([1, 2]))
    each = energy(z, every_class=True)
    assert each.dtype == torch.float32 and torch.equal(energy(z), each[[0, 1], [1, 2]])
    assert (each.bfloat16() != each).any()


@pytest.mark.parametrize("norm", ["element", "chain"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_chain_keeps_its_class(norm, compile):
    z = classes.state(torch.rand(3, 1, 8, 8), torch.tensor([2, 0, 1]))
    energy = wrappers.ClassEnergy(ConvNet(1, 8, 4, outputs=3), 3)
    out = AniLA(0.5, 0.1, norm=norm, bounds=(-1.0, 1.0)).run(
        energy, z, steps=5, seed=0, mask=classes.free(z), compile=compile
    )
    assert torch.equal(out[:, 1], z[:, 1]) and not (out[:, 0] == z[:, 0]).any()


def test_chains_have_the_law_of_their_class():
    """Langevin's law at N(mean_y, 1) has the mean mean_y and the variance 1 / (1 - eps/4), eps the step size."""
    y, eps = torch.arange(3).repeat_interleave(2000), 0.1
    energy = wrappers.ClassEnergy(Wells(), 3)

    def misses(labels) -> bool:
        z = classes.state(torch.zeros(6000, 1, 1, 1), labels)
        out = Langevin(eps).run(energy, z, steps=150, seed=2, mask=classes.free(z), compile=False)
        x = classes.images(out).flatten()
        means = torch.stack([x[y == i].mean() for i in range(3)])
        sd = math.sqrt(1 / (1 - eps / 4))
        return bool(((means - Wells.means).abs() > Z_BOUND * sd / math.sqrt(2000)).any())

    assert not misses(y)
    assert misses((y + 1) % 3)  # chains of another class


# ------------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_that_of_its_definition():
    network = ConvNet(1, 8, 4, outputs=3).double()
    energy = wrappers.ClassEnergy(network, 3)
    generator = torch.Generator().manual_seed(0)
    x, c = (torch.rand(n, 1, 8, 8, dtype=torch.float64, generator=generator) for n in (5, 4))
    y, v = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([2, 2, 0, 1])
    found = losses.likelihood(energy, classes.state(x, y), classes.state(c, v), 0.3, 0.7)
    gradient = torch.autograd.grad(found.loss, list(network.parameters()))
    u, w = ([network(x[i : i + 1])[0] for i in range(len(x))] for x in (x, c))
    own, others = ([e[k] for e, k in zip(each, of, strict=True)] for each, of in ((u, y), (w, v)))
    entropy = sum(own_ + torch.stack([(-e).exp() for e in each]).sum().log() for own_, each in zip(own, u, strict=True))
    loss = sum(own) / 5 - sum(others) / 4 + 0.7 * entropy / 5
    loss = loss + 0.3 * (sum(e**2 for e in own) / 5 + sum(e**2 for e in others) / 4)
    torch.testing.assert_close(found.loss, loss, rtol=1e-6, atol=1e-9)
    for a, b in zip(gradient, torch.autograd.grad(loss, list(network.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert found.energy_data == pytest.approx(float(sum(own).detach() / 5), rel=1e-6)
    right = np.mean([int(torch.stack(tuple(each)).argmin()) == k for each, k in zip(u, y.tolist(), strict=True)])
    assert found.classification.accuracy == pytest.approx(right)
    assert found.classification.cross_entropy == pytest.approx(float(entropy.detach() / 5), rel=1e-6)
    assert losses.likelihood(energy, classes.state(x, y), classes.state(c, v)).classification is None


# --------------------------------------------------------------------------------------------------- where chains start


def test_chains_from_noise_have_the_classes_of_the_data():
    labels = torch.tensor([0] * 70 + [1] * 20 + [5] * 10)
    z = starts.from_noise((20_000, 2, 2, 2), (-1.0, 1.0), seed=1, step=2, labels=labels)
    plain = starts.from_noise((20_000, 2, 2, 2), (-1.0, 1.0), seed=1, step=2)
    assert torch.equal(z[:, :1], plain[:, :1]) and z.dtype == torch.float32
    counts = torch.bincount(classes.labels(z), minlength=6)
    share = torch.tensor([0.7, 0.2, 0, 0, 0, 0.1])
    error = (share * (1 - share) / 20_000).sqrt()
    assert ((counts / 20_000 - share).abs() <= Z_BOUND * error).all()
    uniform = torch.tensor([1 / 3, 1 / 3, 0, 0, 0, 1 / 3])  # classes equally often would be seen
    assert ((counts / 20_000 - uniform).abs() > Z_BOUND * error).any()


def test_a_persistent_chain_keeps_its_class_until_it_restarts():
    labels = torch.arange(7)
    start = starts.PersistentStart(6, 12, (2, 3, 3), (-1.0, 1.0), reinit=0.3, seed=4, labels=labels)
    before, fixed = start.chains.clone(), torch.zeros((), dtype=torch.bool)
    assert len(classes.labels(before).unique()) > 2
    kept = moved = 0
    for update in range(12):
        z, rows = start.draw(update), [(update * 6 + i) % 12 for i in range(6)]
        assert (z[:, 1] == z[:, 1, :1, :1]).all()
        fresh = starts.from_noise(z.shape, (-1.0, 1.0), seed=4, step=update, labels=labels)
        for i, row in enumerate(rows):
            same = torch.equal(z[i], before[row])
            assert same or torch.equal(z[i], fresh[i])  # image and class anew, both
            kept, moved = kept + same, moved + (not same)
        start.keep(update, z, fixed)
        before = start.chains.clone()
    assert kept > 30 and moved > 10
    short = starts.NoiseStart(6, (2, 3, 3), (-1.0, 1.0), seed=4, labels=labels)
    assert torch.equal(short.draw(3), starts.from_noise((6, 2, 3, 3), (-1.0, 1.0), seed=4, step=3, labels=labels))
