"""The names that settings and command lines choose from, which need no torch, and the code that carries them out."""

import pytest
import torch

from fastanila import data, generate
from fastanila.cli import parsers
from fastanila.data import completion, images
from fastanila.models import vae
from fastanila.ops import reference
from fastanila.samplers import SAMPLERS
from fastanila.theory import markov, targets
from fastanila.training import build, config, defaults
from fastanila.training.settings import Settings, names_of


def test_names_are_those_of_the_code():
    assert set(names_of("sampler")) == set(SAMPLERS)
    assert set(defaults.EXACT) == {name for name, kind in SAMPLERS.items() if kind().is_exact}
    assert (*defaults.PLANES, *defaults.IMAGES) == data.NAMES == tuple(defaults.DEFAULTS)
    assert tuple(images.LOADERS) == defaults.IMAGES
    assert names_of("norm") == reference.NORMS
    assert names_of("mask") == completion.REGIONS
    assert parsers.SAMPLE_STARTS == generate.STARTS


def test_each_chain_start_has_a_kind_of_its_own():
    kinds = set()
    for init in names_of("init"):
        settings = config.resolve(Settings(init=init, batch_size=4, chains=None if init != "persistent" else 4))
        proposer = vae.of_vectors(2, 2, 8) if init == "vae" else None
        kinds.add(type(build.build_start(settings, data.load("rings"), "cpu", proposer)))
    assert len(kinds) == len(names_of("init"))


def test_ergodicity_names_its_targets_and_samplers():
    text = parsers.ergodicity().format_help()
    assert all(name in text for name in targets.SHAPED)
    target = targets.load("normal")
    for name, kind in SAMPLERS.items():
        if name not in markov.SAMPLER_NAMES:
            with pytest.raises(ValueError, match="sampler must"):
                markov.transition_kernel(kind(), target, markov.cells(target.box, 50))
        else:
            kernel = markov.transition_kernel(kind(), target, markov.cells(target.box, 50))
            assert torch.from_numpy(kernel.matrix.sum(1)).allclose(torch.ones(50, dtype=torch.float64))
