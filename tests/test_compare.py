"""Comparisons of samplers: settings of equal gradients, runs that go on, the table; and a run given another sampler."""

import dataclasses
import json
import math
import signal
import subprocess

import numpy as np
import pytest
import torch

from fastanila import AdjustedAniLA, Langevin, TamedLangevin, compare, sample
from fastanila.cli import exits
from fastanila.compare import Trial
from fastanila.evaluation import plots
from fastanila.training import build, config, loop, several
from fastanila.training import run as run_training
from fastanila.training import settings as settings_training
from fastanila.training.job import Diverged
from fastanila.training.settings import Settings

#: One worker makes the runs that most of them look at.
pytestmark = pytest.mark.xdist_group("compare")


def test_equal_gradients_and_equal_clip_levels():
    common = dict(data="rings", iterations=10)
    of = {name: compare.settings_of(Trial(name, 7.0, 3), common) for name in settings_training.names_of("sampler")}
    steps = config.resolve(Settings(sampler="anila")).steps
    wanted = {
        "langevin": steps, "anila": steps, "tamed": steps, "gd": steps, "mala": steps - 1, "anila-mh": steps - 1,
        "hmc": (steps - 1) // 10,
    }  # fmt: skip
    assert {name: of[name].steps for name in wanted} == wanted
    for name, s in of.items():
        few = compare.settings_of(Trial(name, 7.0, 3), common | {"steps": 22})
        assert few.steps == {steps: 22, steps - 1: 21, (steps - 1) // 10: 2}[s.steps]
        assert s.sampler == name and s.seed == 3 and s.iterations == 10
    assert of["anila"].threshold == of["anila-mh"].threshold == 7.0
    tamed = build.build_sampler(of["tamed"], (-1.0, 1.0))
    assert tamed._level == pytest.approx(7.0)


def test_replicas_share_a_chains_gradients(tmp_path, capsys):
    common = dict(data="rings", iterations=10, replicas=4, highest=9.0)
    of = {name: compare.settings_of(Trial(name, None, 3), common) for name in ("langevin", "mala")}
    assert [(s.replicas, s.steps) for s in of.values()] == [(1, 60), (4, 14)]  # 4 (14 + 1) gradients
    for flags, message in (
        (["--replicas", "2"], "replicas has no effect without one of the exact samplers"),
        (["--samplers", "mala", "--highest", "9"], "highest has no effect without replicas"),
        (["--preset", "rings", "--replicas", "2"], "replicas has no effect with preset"),
    ):
        assert compare.main([*flags, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_only_samplers_with_a_threshold_are_run_for_each():
    chosen = list(compare.trials(["mala", "tamed"], [2.0, 5.0], [0, 1]))
    assert [t.name for t in chosen] == [
        "mala-seed0", "mala-seed1", "tamed-b2-seed0", "tamed-b2-seed1", "tamed-b5-seed0", "tamed-b5-seed1",
    ]  # fmt: skip


def test_settings_of_images_at_a_temperature_become_those_of_an_exact_sampler():
    ours = config.resolve(Settings(data="digits"))
    exact = config.resolve(Settings(data="digits", sampler="anila-mh"))
    heat = ours.noise_scale**2
    assert exact.step_size == pytest.approx(ours.step_size * heat) and exact.noise_scale == 1.0 and not exact.clamp
    # a chain at U / heat sees scores 1 / heat as large: it moves as far, and clips as often
    assert exact.threshold * heat == pytest.approx(ours.threshold)
    for field, value in (("noise_scale", 0.5), ("clamp", True), ("refresh", "update")):
        with pytest.raises(ValueError, match=rf"^{field} must be .* with sampler=mala, got {value}: "):
            config.resolve(Settings(data="digits", sampler="mala", **{field: value}))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    command = ["--samplers", "langevin", "anila-mh", "--thresholds", "5", "--iterations", "2", "--no-fused"]
    command += ["--seeds", "1", "--out", str(out), "--jobs", "2"]
    assert compare.main(command) == 0
    return out, command


def test_compare_writes_a_table_a_figure_and_goes_on(compared, capsys, monkeypatch):
    out, command = compared
    lines = json.loads((out / "compare.json").read_text())
    assert [(line["sampler"], line["threshold"], line["seed"]) for line in lines] == [
        ("langevin", None, 1), ("anila-mh", 5.0, 1),
    ]  # fmt: skip
    assert all(math.isfinite(line["gap"]) and not line["diverged"] for line in lines)
    assert lines[0]["acceptance"] == 1 and 0.5 < lines[1]["acceptance"] < 1
    assert (out / "compare.png").stat().st_size > 1000

    def fails(*_, **__):
        raise AssertionError("a run that is complete was made again")

    monkeypatch.setattr(several.subprocess, "run", fails)
    assert compare.main(command) == 0
    table = capsys.readouterr().out
    assert "| langevin | - |" in table and "| anila-mh | 5 |" in table and "0 of 1" in table


def test_a_folder_of_other_runs_is_refused(compared, capsys):
    _, command = compared
    assert compare.main([*command, "--step-size", "0.5"]) == 2
    assert "out holds a run with another step_size" in capsys.readouterr().err


def tiny():
    return config.resolve(
        Settings(iterations=3, steps=2, chains=8, batch_size=8, width=4, features=2, sample_every=0, fused=False)
    )


@pytest.mark.parametrize("threads", [None, 1])
def test_a_run_cut_short_ahead_of_its_first_checkpoint_is_made_again(tmp_path, threads):
    settings, directory = tiny(), tmp_path / "rings-seed0"
    (directory / "samples").mkdir(parents=True)
    (directory / "config.json").write_text(config.dump(dataclasses.replace(settings, out=str(directory))))
    assert several.train(settings, directory, threads) and several.progress(directory) == 3


@pytest.mark.parametrize("threads", [None, 1])
def test_a_run_that_ends_early_has_not_ended_well(tmp_path, monkeypatch, threads):
    """As after --minutes: exit code 0, and updates left."""
    directory, train = tmp_path / "run", loop.train

    def stops_early(*_, **__):
        train(dataclasses.replace(tiny(), out=str(directory)), say=lambda line: None, minutes=1e-9)
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(several.subprocess, "run", stops_early)
    monkeypatch.setattr(several.loop, "train", stops_early)
    with pytest.raises(several.Failed, match=r"run: training ended after update 1 of 3$"):
        several.train(tiny(), directory, threads)
    monkeypatch.undo()
    assert several.train(tiny(), directory) and several.progress(directory) == 3  # what is left


@pytest.mark.parametrize("threads", [None, 1])
def test_how_a_training_ended(tmp_path, monkeypatch, threads):
    def diverges(*_, **__):
        if threads is None:
            raise Diverged("not finite")
        return subprocess.CompletedProcess([], exits.DIVERGED)

    def fails(*_, **__):
        if threads is None:
            raise torch._dynamo.exc.TorchDynamoException("no compiler")
        return subprocess.CompletedProcess([], exits.FAILED, stderr="error: no compiler\n")

    for ends in (diverges, fails):
        monkeypatch.setattr(several.subprocess, "run", ends)
        monkeypatch.setattr(several.loop, "train", ends)
        if ends is diverges:
            assert not several.train(tiny(), tmp_path / "run", threads)
        else:
            with pytest.raises(several.Failed, match=r"run: .*no compiler\)?$"):
                several.train(tiny(), tmp_path / "run", threads)


def test_a_signal_ends_a_comparison_with_its_code(tmp_path, monkeypatch, capsys):
    for stop, code in ((KeyboardInterrupt(), 130), (loop.Interrupted("SIGTERM: stopped", signal.SIGTERM), 143)):

        def interrupted(*_, stop=stop, **__):
            raise stop

        monkeypatch.setattr(several.loop, "train", interrupted)
        with pytest.raises(SystemExit) as ended:
            compare.main(["--samplers", "mala", "--iterations", "1", "--no-fused", "--out", str(tmp_path / "x")])
        assert ended.value.code == code and capsys.readouterr().err == "stopped; the same command goes on\n"


def test_settings_of_every_run(tmp_path, capsys, monkeypatch):
    seen = {}

    def noted(resolved, *_):
        seen.update(resolved)
        raise several.Failed("seen")

    monkeypatch.setattr(several, "train_all", noted)
    common = ["--samplers", "langevin", "anila", "--out", str(tmp_path / "x"), "--settings"]
    assert compare.main([*common, "chains=64", "batch-size=32", "norm=chain", "ema=0.5"]) == 2
    assert {(s.chains, s.batch_size, s.ema) for s in seen.values()} == {(64, 32, 0.5)}
    assert seen["anila-b10-seed0"].norm == "chain"
    for texts, message in (
        (["chains"], "settings must be of NAME=VALUE, got 'chains'"),
        (["chains=4", "chains=8"], "settings has chains twice"),
        (["breadth=4"], "settings has an unknown key 'breadth'"),
        (["width=wide"], "width must be an integer, got 'wide'"),
        (["seed=3"], "settings cannot have seed, which the comparison or a flag of its own gives"),
        (["threshold=3"], "settings cannot have threshold, which"),
        (["vae_width=3"], "vae_width has no effect with init=persistent"),
    ):
        assert compare.main([*common, *texts]) == 2
        assert f"error: {message}" in capsys.readouterr().err


def test_a_diverged_run_is_a_line_of_the_table():
    lines = [
        dict(sampler="anila", threshold=2.0, seed=0, diverged=True, run="a"),
        dict(sampler="anila", threshold=2.0, seed=1, diverged=False, run="b", gap=0.5, tv=0.1, clip_fraction=0.25,
             acceptance=1.0, seconds=3.0),
    ]  # fmt: skip
    (row,) = compare.summary(lines)
    assert row["diverged"] == 1 and row["seeds"] == 2 and row["gap"] == 0.5 and row["each"] == [0.5]
    assert "| anila | 2 | 0.500 | 0.100 | 0.250 | 1.000 | 3.000 | 0.500 | 1 of 2 |" in compare.table([row])
    (row,) = compare.summary(lines[:1])
    assert "| anila | 2 | - | 1 of 1 |" in compare.table([row])


def test_the_figure_shows_numbers_of_any_sign(tmp_path, monkeypatch):
    """KID is not biased, and so is negative for half of the models that are as good as the data."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda _, figure: figures.append(figure))
    for kid in (0.5, -0.25):
        lines = [
            dict(sampler="anila", threshold=threshold, seed=0, diverged=False, kid=number)
            for threshold, number in ((2.0, 1.0), (4.0, kid))
        ]
        lines += [dict(sampler="mala", threshold=None, seed=0, diverged=False, kid=1.0)]
        plots.save_comparison(tmp_path / "x.png", compare.summary(lines), "KID")
    scales, labels, lows = zip(
        *((axis.get_yscale(), axis.get_ylabel(), axis.get_ylim()[0]) for (axis,) in (f.axes for f in figures)),
        strict=True,
    )
    assert scales == ("log", "linear") and set(labels) == {"KID"} and lows[1] < -0.25


def test_a_run_given_another_sampler(compared, tmp_path, capsys):
    out, _ = compared
    run = run_training.load(out / "langevin-seed1", "cpu")
    assert run_training.with_sampler(run, "langevin", step_size=0.5).sampler == Langevin(0.5)
    other = run_training.with_sampler(run, "anila-mh", threshold=3.0, norm="chain")
    assert other.sampler == AdjustedAniLA(3.0, run.settings.step_size, "chain") and other.energy is run.energy
    assert isinstance(run_training.with_sampler(other, "tamed").sampler, TamedLangevin)
    cold = run._replace(settings=config.resolve(Settings(sampler="langevin", noise_scale=0.1, threshold=7.0)))
    warm = run_training.with_sampler(cold, "mala")
    x = torch.randn(5, 2)
    torch.testing.assert_close(warm.energy(x), run.energy(x) / 0.01)
    with pytest.raises(ValueError, match=r"sampler must be one of langevin, .*, got 'nuts'"):
        run_training.with_sampler(run, "nuts")
    frozen = run._replace(settings=config.resolve(Settings(sampler="anila", refresh="update")))
    assert run_training.with_sampler(frozen, "anila", step_size=0.3).sampler.refresh == "update"
    assert run_training.with_sampler(cold, "tamed", step_size=0.25).sampler.threshold == pytest.approx(7.0 * 0.5)
    with pytest.raises(ValueError, match="norm is no setting of mala, which has step_size; got chain"):
        run_training.with_sampler(run, "mala", norm="chain")
    still = run._replace(settings=config.resolve(Settings(sampler="langevin", noise_scale=0.0)))
    with pytest.raises(ValueError, match=r"noise_scale must be positive for sampler=mala, got 0\.0"):
        run_training.with_sampler(still, "mala")
    with pytest.raises(ValueError, match="threshold must be positive or inf, got 0"):
        run_training.with_sampler(run, "anila", threshold=0)

    common = [str(out / "langevin-seed1"), "--count", "20", "--no-fused", "--out", str(tmp_path / "s.npz")]
    for flags in ("mala --warm-up 5", "hmc --leapfrog-steps 3", "tamed --threshold 0.3", "gd"):
        assert sample.main([*common, "--steps", "3", "--sampler", *flags.split()]) == 0
        assert np.isfinite(np.load(tmp_path / "s.npz")["samples"]).all()
    capsys.readouterr()
    assert sample.main([*common, "--warm-up", "5"]) == 2
    assert capsys.readouterr().err == "error: warm_up adapts an exact sampler's step size, got sampler langevin\n"
    assert sample.main([*common, "--sampler", "mala", "--warm-up", "-5"]) == 2
    assert "warm_up must be an integer of at least 0, got -5" in capsys.readouterr().err
