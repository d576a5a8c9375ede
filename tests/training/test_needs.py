"""Settings that would change nothing: an error for a flag, a warning for a config file, each with its reason."""

import dataclasses
import itertools

import pytest
import torch

from fastanila import compare, ergodicity, evaluate, sample, train
from fastanila.data import Images
from fastanila.samplers import EXACT
from fastanila.training import build, config, needs
from fastanila.training import settings as settings_training
from fastanila.training.settings import Settings
from run_files import quiet

TINY = dict(
    iterations=2, steps=2, batch_size=16, chains=16, width=8, features=4, log_every=1, sample_every=0, fused=False
)
#: flags without effect, and what the error names
IDLE = {
    "--data digits --image-size 16": "image_size has no effect with data=digits: it needs data=image-folder or ",
    "--data cifar10 --channels 3": "channels has no effect with data=cifar10: it needs data=image-",
    "--data rings --data-dir .": "data_dir has no effect with data=rings: it needs data=image-folder, cifar10",
    "--data digits --download": "download has no effect with data=digits: it needs data=cifar10 or flowers102",
    "--data digits --depth 5": "depth has no effect with energy=convnet: it needs energy=mlp",
    "--features=0 --feature-scale=2": "feature_scale has no effect with features=0: it needs features above 0",
    "--data digits --class-weight 2": "class_weight has no effect with classes=False: it needs classes=True",
    "--mask half": "mask has no effect with task=generation: it needs task=completion",
    "--latent 7": "latent has no effect with init=persistent: it needs init=vae",
    "--vae-lr-decay none": "vae_lr_decay has no effect with init=persistent: it needs init=vae",
    "--init noise --reinit 0.5": "reinit has no effect with init=noise: it needs init=persistent",
    "--sampler langevin --threshold 5": "threshold has no effect with sampler=langevin: it needs sampler=anila,",
    "--threshold 10 --sampler mala": "threshold has no effect with sampler=mala",  # as the default is
    "--sampler mala --leapfrog_steps 3": "leapfrog_steps has no effect with sampler=mala: it needs sampler=hmc",
    "--sampler tamed --refresh update": "refresh has no effect with sampler=tamed: it needs sampler=anila",
    "--sampler hmc --norm chain": "norm has no effect with sampler=hmc",
    "--sampler gd --noise-scale 2": "noise_scale has no effect with sampler=gd: it needs sampler=langevin, ",
    "--latent 7 --mask half": "mask has no effect with task=generation: it needs task=completion; latent has no",
}


@pytest.mark.parametrize("flags", IDLE)
def test_a_flag_without_effect_is_refused(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {IDLE[flags]}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        "--sampler mala --no-clamp --noise-scale 1",
        "--sampler anila --refresh update --clamp --threshold 3",
        "--init vae --latent 7 --vae-lr 0.1",
        "--data digits --task completion --mask half --latent 7",
        "--sampler hmc --leapfrog-steps 3",
        "--depth 1 --features 4 --feature-scale 2 --reinit 0",
    ],
)
def test_a_flag_with_effect_is_not(flags):
    train.parse(flags.split())


def test_what_a_need_allows_changes_what_is_built(monkeypatch):
    """The table against the program: of each sampler, start and energy the settings that reach the parts."""
    monkeypatch.setattr(build, "load_data", lambda s, device: Images("x", *[torch.zeros(4, 1, 8, 8).byte()] * 2))
    changed = dict(threshold=3.0, leapfrog_steps=3, norm="chain", noise_scale=0.5, clamp=True, refresh="update")
    for sampler, (name, value) in itertools.product(settings_training.names_of("sampler"), changed.items()):
        settings = config.resolve(Settings(sampler=sampler))
        other = dataclasses.replace(settings, **{name: value})
        if sampler in EXACT and name in ("noise_scale", "clamp", "refresh"):
            continue  # refused
        same = build.build_sampler(settings, (-1.0, 1.0)) == build.build_sampler(other, (-1.0, 1.0))
        assert same == bool(needs.idle(settings, [name])), (sampler, name)


def test_a_config_file_is_warned_of_and_a_run_s_own_is_not(tmp_path, capsys):
    file = tmp_path / "shared.toml"
    file.write_text('sampler = "langevin"\nthreshold = 5.0\nlatent = 2\nleapfrog-steps = 10\ndepth = 3\n')
    settings, *_ = train.parse(["--config", str(file)])
    assert settings.depth == 3
    warned = f"warning: config {file}: threshold has no effect with sampler=langevin: it needs sampler="
    err = capsys.readouterr().err
    assert err.startswith(warned) and err.count("\n") == 1  # and of nothing that is as it would be without it
    train.parse(["--config", str(file), "--sampler", "anila"])
    assert capsys.readouterr().err == ""
    for flags in ([], ["--data", "digits"], ["--init", "vae"], ["--sampler", "mala"]):
        (tmp_path / "whole.json").write_text(config.dump(config.resolve(train.parse(flags)[0])))
        train.parse(["--config", str(tmp_path / "whole.json")])
        assert capsys.readouterr().err == "", flags


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    quiet(Settings(**TINY, out=str(directory)))
    return str(directory)


def test_the_other_commands(run, tmp_path, capsys):
    out = ["--out", str(tmp_path / "s.png")]
    for main, flags, message in (
        (train.main, ["--resume", run, *out], "out has no effect with resume"),
        (train.main, ["--resume", run, "--download"], "download has no effect with data=rings"),
        (sample.main, [run, *out, "--completions", "2"], "completions has no effect where nothing is completed"),
        (sample.main, [run, *out, "--data-dir", "x"], "data_dir has no effect where no data are read"),
        (
            sample.main,
            [run, *out, "--steps", "0", "--sampler", "mala"],
            "sampler has no effect where no transitions are",
        ),
        (evaluate.main, [run, "--draws", "9"], "draws has no effect without chains"),
        (evaluate.main, [run, "--seed", "0"], "seed has no effect without chains"),
        (evaluate.main, [run, "--data-dir", "."], "data_dir has no effect with data=rings"),
        (evaluate.main, [run, "--fid"], "fid has no effect but on a model of whole images"),
        (evaluate.main, [run, "--count", "9"], "count has no effect but on a model of whole images"),
        (ergodicity.main, ["--table", *out], "out has no effect with table"),
        (compare.main, [*out, "--data-dir", "."], "data_dir has no effect with data=rings"),
        (
            compare.main,
            [*out, "--samplers", "mala", "--thresholds", "1"],
            "thresholds has no effect with samplers=mala",
        ),
    ):
        assert main(flags) == 2, message
        err = capsys.readouterr().err
        assert err.startswith(f"error: {message}") and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())
