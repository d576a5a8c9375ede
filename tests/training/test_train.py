"""The trainer as its users run it: numbers, files, exit codes, bad input, resuming."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

import fastanila
from fastanila import evaluate, sample
from fastanila import train as command
from fastanila.evaluation import plane
from fastanila.samplers import stepwise
from fastanila.training import checkpoint, config, learner, loop
from fastanila.training import job as job_training
from fastanila.training import update as update_training
from fastanila.training.settings import Settings
from run_files import final, numbers, quiet, rows

SMALL = dict(
    sampler="anila",
    step_size=0.01,
    iterations=12,
    steps=4,
    batch_size=64,
    chains=128,
    width=16,
    features=8,
    log_every=1,
    sample_every=0,
)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "small"
    quiet(Settings(**SMALL | dict(sample_every=6), fused=False, out=str(directory)))
    return directory


# ------------------------------------------------------------------------------------------------------------ numbers


def test_fused_and_plain_give_the_same_numbers_without_a_graph_break(tmp_path):
    """The default job's first twenty updates by both paths: one noise stream."""
    torch._dynamo.reset()
    counters.clear()
    for fused in (True, False):
        settings = Settings(iterations=20, log_every=1, sample_every=0, fused=fused, out=str(tmp_path / str(fused)))
        quiet(settings)
        if fused:
            assert not counters["graph_break"]
            # the transition, the first as all others: on a CPU what runs once an update is not worth compiling
            assert counters["stats"]["unique_graphs"] == 1
    for a, b in zip(rows(tmp_path / "True"), rows(tmp_path / "False"), strict=True):
        for key in a.keys() - {"seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-3), (a["iteration"], key)


def test_training_improves_the_likelihood(tmp_path):
    settings = Settings(
        **SMALL | dict(data="8gaussians", iterations=300, steps=10, batch_size=128, lr=3e-3, log_every=100),
        threshold=20.0,
        fused=False,
        out=str(tmp_path / "run"),
    )
    job = job_training.prepare(settings)
    before = plane.evaluate(job.ebm.module, job.data, resolution=100)
    run = loop.run(job, say=lambda line: None)
    after = plane.evaluate(run.energy, job.data, resolution=100)
    assert after["nll"] < before["nll"] - 0.3 and after["tv"] < before["tv"] - 0.1


def test_learning_rate_and_average():
    s = config.resolve(Settings(iterations=100, lr=0.1))
    rate = learner.Schedule(s.lr, s.lr_decay, 100)
    assert [rate.at(i) for i in (0, 50, 99)] == pytest.approx([0.1, 0.05, 0.001])
    assert [rate.on(torch.device("cpu")).at(torch.tensor(i)).item() for i in (0, 50, 99)] == pytest.approx(
        [rate.at(i) for i in (0, 50, 99)]
    )
    assert learner.Schedule(0.1, "none", 100, first=7).at(99) == 0.1
    assert learner.Schedule(0.1, "none", 100, first=7).at(6) == 0.0
    energy = torch.nn.Linear(1, 1)
    average = learner.averaged(energy)
    before = average.weight.clone()
    with torch.no_grad():
        energy.weight += 1
    learner.follow([list(average.parameters())], [[p.detach() for p in energy.parameters()]], [torch.tensor(0.9)])
    torch.testing.assert_close(average.weight, before + 0.1)
    assert not average.weight.requires_grad and energy.weight.requires_grad


@pytest.mark.parametrize(
    "options",
    [
        dict(init="data", batch_size=32),
        dict(init="noise", batch_size=32),
        dict(sampler="langevin"),
        dict(sampler="mala"),
        dict(sampler="anila-mh", threshold=1.0, norm="chain"),
        dict(sampler="hmc", leapfrog_steps=2),
        dict(sampler="tamed"),
        dict(sampler="gd"),
        dict(sampler="anila-mh", data="digits", energy="convnet", width=4, chains=32, batch_size=16, features=0),
        dict(threshold=math.inf, norm="chain"),
        dict(threshold=1.0, refresh="update"),
        dict(precision="bf16"),
        dict(energy_l2=0.1, data_noise=0.05, clip_grad=0.1, ema=0.0, lr_decay="none"),
        dict(data="checkerboard", clamp=True),
        dict(data="digits", energy="convnet", width=4, chains=32, batch_size=16, features=0),
        dict(data="digits", energy="unet", width=4, chains=32, batch_size=16, features=0, classes=True),
        dict(data="digits", energy="unet", width=4, chains=32, batch_size=16, features=0, precision="bf16", matching=2),
    ],
    ids=str,
)
def test_every_option_trains(tmp_path, options):
    chosen = SMALL | dict(iterations=3, fused=False, out=str(tmp_path / "run")) | options
    if chosen.get("init") in ("data", "noise"):
        del chosen["chains"]
    run = quiet(Settings(**chosen))
    assert run.chains.isfinite().all() and run.iteration == 3
    assert len(rows(tmp_path / "run")) == 3
    accepted = rows(tmp_path / "run")[-1]["acceptance"]
    assert 0.3 < accepted < 1 if run.sampler.is_exact else accepted == 1
    if options.get("clamp"):
        assert run.chains.abs().max() <= 4


def test_clipping_the_gradient(tmp_path):
    for limit in (0.0, 1e-12):
        quiet(
            Settings(
                **SMALL | dict(iterations=5), clip_grad=limit, ema=0.0, fused=False, out=str(tmp_path / str(limit))
            )
        )
    assert rows(tmp_path / "0.0")[-1]["grad_norm"] > 1e-3
    job = job_training.prepare(Settings(**SMALL, fused=False))
    parameters = list(job.ebm.module.parameters())
    job.ebm.optimizer = torch.optim.SGD(parameters, lr=torch.tensor(1.0), fused=True)
    job.ebm.rate = learner.Schedule(1.0, "none", 1)
    job.settings = config.resolve(Settings(**SMALL, clip_grad=1e-3, fused=False))
    before = [p.detach().clone() for p in parameters]
    made = update_training.build_update(job)()
    moved = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(parameters, before, strict=True)))
    assert made.grad_norms[0] > 1e-3  # as it was before clipping
    assert moved == pytest.approx(1e-3, rel=1e-2)


# -------------------------------------------------------------------------------------------------------------- files


def test_a_run_directory_holds_everything(small_run):
    settings = config.read(small_run / "config.json")
    assert (
        settings["threshold"] == 10.0
        and settings["out"] == str(small_run)
        and None not in [v for k, v in settings.items() if k not in ("data_dir",)]
    )
    first = rows(small_run)[0]
    wanted = "iteration energy_data energy_chains energy_gap score_rms clip_fraction grad_norm seconds".split()
    assert set(wanted) <= set(first)
    assert first["energy_gap"] == pytest.approx(first["energy_chains"] - first["energy_data"], abs=1e-5)
    assert {"nll", "tv"} <= set(rows(small_run)[5])
    for picture in ("samples/00000006.png", "samples/00000012.png", "figure.png"):
        assert Image.open(small_run / picture).size[0] > 500
    assert (small_run / "checkpoints" / "00000012.safetensors").exists()


def test_load_gives_the_run_back(small_run):
    run = fastanila.load(small_run)
    assert run.iteration == 12 and run.chains.shape == (128, 2) and run.settings.steps == 4
    assert run.sampler == fastanila.AniLA(threshold=10.0, step_size=0.01)
    assert not run.energy.training and run.energy(run.chains).shape == (128,)
    tensors = final(small_run)
    for name, value in run.energy.state_dict().items():
        assert torch.equal(value, tensors[f"ema.{name}"])
    assert not torch.equal(tensors["ema.head.weight"], tensors["energy.head.weight"])
    z = run.sampler.run(run.energy, run.chains, steps=2, seed=0, compile=False)
    assert z.isfinite().all()
    with pytest.raises(FileNotFoundError, match="is not a run"):
        fastanila.load(small_run / "samples")


def test_the_model_does_not_depend_on_torchs_generator():
    torch.manual_seed(1)
    a = job_training.prepare(Settings(**SMALL)).ebm.module.state_dict()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    b = job_training.prepare(Settings(**SMALL)).ebm.module.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(state, torch.random.get_rng_state())


def test_sample_command(small_run, tmp_path, capsys):
    assert (
        sample.main(
            [str(small_run), "--count", "200", "--steps", "3", "--out", str(tmp_path / "a" / "s.npz"), "--no-fused"]
        )
        == 0
    )
    z = np.load(tmp_path / "a" / "s.npz")["samples"]
    assert z.shape == (200, 2) and np.isfinite(z).all()
    assert not np.isclose(z[:72], z[128:]).all(axis=1).any()  # chains used twice part ways
    sample.main(
        [
            str(small_run),
            "--count",
            "9",
            "--steps",
            "2",
            "--start",
            "noise",
            "--out",
            str(tmp_path / "s.png"),
            "--no-fused",
        ]
    )
    assert Image.open(tmp_path / "s.png").size[0] > 500
    capsys.readouterr()
    for bad, message in (
        (["--out", "s.jpg"], "out must end in .png or .npz, got s.jpg"),
        (["--count", "0"], "count must be an integer of at least 1, got 0"),
        (["--steps", "-1"], "steps must be an integer of at least 0, got -1"),
    ):
        assert sample.main([str(small_run), *bad]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert sample.main([str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_evaluate_command(small_run, capsys):
    assert evaluate.main([str(small_run)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"nll", "entropy", "tv", "kl", "tv_chains", "tv_chains_floor", "boundary_mass"} <= set(report)
    assert report["nll"] > report["entropy"] and 0 < report["tv"] < 1
    assert report["gap"] == pytest.approx(report["kl"], abs=1e-6)
    assert evaluate.main(["nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere is not a run")


def test_images_end_to_end(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 10, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    out = tmp_path / "run"
    flags = f"--data image-folder --data-dir {tmp_path / 'images'} --image-size 8 --width 4 --chains 32 --batch-size 16"
    flags += f" --iterations 4 --steps 2 --log-every 2 --sample-every 2 --no-fused --out {out}"
    assert command.main(flags.split()) == 0
    assert Image.open(out / "samples" / "00000004.png").size[0] > 100
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cpu: plain definition, eager" and str(out) in lines[-1]
    assert evaluate.main([str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"kid", "kid_sd", "frechet", "kid_start", "copied", "accuracy", "baselines"} <= set(report)
    assert sample.main([str(out), "--count", "5", "--out", str(tmp_path / "s.png"), "--no-fused"]) == 0


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    quiet(Settings(**SMALL | dict(iterations=3), tensorboard=True, fused=False, out=str(tmp_path / "run")))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


# ----------------------------------------------------------------------------------------------------------- resuming


def test_resume_gives_the_numbers_of_an_uninterrupted_run(tmp_path):
    settings = Settings(**SMALL | dict(save_every=5, sample_every=6), fused=False, out=str(tmp_path / "whole"))
    quiet(settings)
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", half)
    (half / "checkpoints" / "00000012.safetensors").unlink()  # leaves update 10's, with rows up to 12
    quiet(Settings(**SMALL | dict(save_every=5, sample_every=6), fused=False), resume=half)
    assert numbers(half) == numbers(tmp_path / "whole")
    a, b = final(tmp_path / "whole"), final(half)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    # teeth: without the optimizer's moments, or without the chains, the numbers differ
    for name in ("optimizer.exp_avg.head.weight", "start.population"):
        twin = tmp_path / name
        shutil.copytree(half, twin)
        (twin / "checkpoints" / "00000012.safetensors").unlink()
        tensors, state = checkpoint.load_latest(twin / "checkpoints")
        tensors[name] = torch.zeros_like(tensors[name])
        checkpoint.save(twin / "checkpoints" / "00000010.safetensors", tensors, state)
        quiet(Settings(**SMALL | dict(save_every=5, sample_every=6), fused=False), resume=twin)
        assert numbers(twin) != numbers(half)


def test_a_run_can_be_extended(tmp_path):
    quiet(Settings(**SMALL | dict(iterations=4, lr_decay="none"), fused=False, out=str(tmp_path / "run")))
    quiet(Settings(**SMALL | dict(iterations=9, lr_decay="none"), fused=False), resume=tmp_path / "run")
    quiet(Settings(**SMALL | dict(iterations=9, lr_decay="none"), fused=False, out=str(tmp_path / "whole")))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("init", ["persistent", "vae"])
def test_a_longer_run_says_how_it_changes_the_decay(tmp_path, init, capsys):
    out, own = tmp_path / "run", dict(init=init, chains=64, lr=1e-3, vae_width=8, fused=False)
    own |= dict(vae_warm_up=1, vae_lr=1e-2) if init == "vae" else {}
    quiet(Settings(**SMALL | own | dict(iterations=4, save_every=2), out=str(out)))
    (out / "checkpoints" / "00000004.safetensors").unlink()
    said = []
    assert command.main(["--resume", str(out), "--iterations", "8", "--dry-run"]) == 0
    err = capsys.readouterr().err
    loop.train(Settings(**SMALL | own | dict(iterations=8)), resume=out, say=said.append)
    notes = [line for line in said if line.startswith("note: ")]
    assert err.splitlines() == notes and len(notes) == (2 if init == "vae" else 1)
    decay = "now ends at update 8, not 4: it goes on at"
    assert notes[0] == f"note: the decay of --lr-decay linear {decay} 0.00075 where it was 0.0005"
    if init == "vae":
        assert notes[1] == f"note: the decay of --vae-lr-decay linear {decay} 0.0075 where it was 0.005"
    said.clear()
    loop.train(Settings(**SMALL | own | dict(iterations=8)), resume=out, say=said.append)  # nothing has changed
    assert not [line for line in said if line.startswith("note: ")]


def test_a_fused_run_resumes_with_the_same_numbers(tmp_path, graphs):
    options = SMALL | dict(save_every=8, fused=True)
    quiet(Settings(**options, out=str(tmp_path / "whole")))
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / "checkpoints" / "00000012.safetensors").unlink()
    quiet(Settings(**options), resume=tmp_path / "half")
    assert graphs and numbers(tmp_path / "half") == numbers(tmp_path / "whole")
    a, b = final(tmp_path / "whole"), final(tmp_path / "half")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_compiled_run_resumes_with_the_same_numbers(tmp_path):
    """In a fresh process each, as it happens."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()] + ["--save-every=8"]
    command_line = [sys.executable, "-m", "fastanila.train"]
    subprocess.run([*command_line, *flags, f"--out={tmp_path / 'whole'}"], check=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / "checkpoints" / "00000012.safetensors").unlink()
    subprocess.run([*command_line, "--resume", str(tmp_path / "half")], check=True)
    assert numbers(tmp_path / "half") == numbers(tmp_path / "whole")
    a, b = final(tmp_path / "whole"), final(tmp_path / "half")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resuming_past_the_end_is_refused(small_run, capsys):
    assert command.main(["--resume", str(small_run), "--iterations", "5"]) == 2
    assert "iterations must be at least the 12 made already, got 5" in capsys.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint(tmp_path, number, code):
    flags = "--no-fused --steps 4 --batch-size 64 --chains 64 --width 16 --features 8 --log-every 1 --sample-every 0"
    flags = [*flags.split(), "--iterations", "100000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "-m", "fastanila.train", *flags], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code and f"--resume {tmp_path / 'run'}" in err
    made = rows(tmp_path / "run")[-1]["iteration"]
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints")[1]["iteration"] == made
    assert command.main(["--resume", str(tmp_path / "run"), "--iterations", str(made + 2), "--no-fused"]) == 0
    assert [row["iteration"] for row in rows(tmp_path / "run")] == list(range(1, made + 3))


def test_divergence_keeps_the_last_good_state(tmp_path, capsys):
    flags = "--no-fused --steps 2 --batch-size 16 --chains 16 --width 16 --features 8 --iterations 500 --lr 1e6"
    assert command.main([*flags.split(), "--sample-every", "0", "--out", str(tmp_path / "run")]) == 3
    assert "diverged at update" in capsys.readouterr().err
    tensors = final(tmp_path / "run")
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("where", ["score", "chains", "loss"])
def test_what_is_not_finite_never_reaches_the_parameters(where):
    job = job_training.prepare(Settings(**SMALL, fused=False))
    update = update_training.build_update(job)
    update()
    assert not job.broken
    if where == "loss":
        job.data = type("Broken", (), {"draw": lambda self, *a, **k: torch.full((64, 2), math.nan)})()
    elif where == "score":
        job.start.draw = lambda update, batch: torch.full((64, 2), math.inf)
    else:
        job.start.draw = lambda update, batch: torch.full((64, 2), math.nan)
    before = {k: v.clone() for k, v in job.ebm.module.state_dict().items()}
    moments = [v["exp_avg"].clone() for v in job.ebm.optimizer.state.values()]
    population = job.start.chains.clone()
    average = [p.clone() for p in job.ebm.average.parameters()]
    chains = job.chains.clone()
    for _ in range(2):  # and none is made after it
        update()
    assert job.broken and job.made == 1
    assert torch.equal(job.chains, chains)
    assert all(torch.equal(p, q) for p, q in zip(job.ebm.average.parameters(), average, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in job.ebm.module.state_dict().items())
    assert all(torch.equal(v["exp_avg"], m) for v, m in zip(job.ebm.optimizer.state.values(), moments, strict=True))
    assert torch.equal(job.start.chains, population)


# ---------------------------------------------------------------------------------------------- settings and bad input


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(["--dry-run", "--threshold", "inf"]) == 0
    lines = capsys.readouterr().out.split("\n", 1)
    assert lines[0] == "cpu: compiled reference" or lines[0].startswith("cuda")
    settings = json.loads(lines[1])
    assert settings["threshold"] == "inf" and settings["steps"] == 40
    assert not list(tmp_path.iterdir())


def test_default_directories_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert job_training.new_directory(Settings()).as_posix() == "runs/rings"
    (tmp_path / "runs" / "rings").mkdir(parents=True)
    assert job_training.new_directory(Settings()).as_posix() == "runs/rings-2"


def test_config_file_flags_win_and_config_json_starts_a_run_again(tmp_path, small_run):
    toml = tmp_path / "a.toml"
    toml.write_text('data = "8gaussians"\nstep-size = 0.02\nthreshold = inf\nsteps = 7\n')
    settings, *_ = command.parse(["--config", str(toml), "--steps", "9"])
    assert (settings.data, settings.step_size, settings.threshold, settings.steps) == ("8gaussians", 0.02, math.inf, 9)
    settings, *_ = command.parse(["--config", str(small_run / "config.json"), "--out", str(tmp_path / "again")])
    assert settings.fused is False and settings.out == str(tmp_path / "again")
    quiet(settings)
    assert numbers(tmp_path / "again") == numbers(small_run)


BAD = {
    "unknown data": ("--data circles", "data must be one of rings, "),
    "threshold 0": ("--threshold 0", "threshold must be positive or inf, got 0.0"),
    "threshold nan": ("--threshold nan", "threshold must be positive or inf, got nan"),
    "steps 0": ("--steps 0", "steps must be an integer of at least 1, got 0"),
    "chains": ("--chains 100 --batch-size 64", "chains must be a multiple of batch_size (64), got 100"),
    "chains of noise": ("--init noise --chains 128 --batch-size 64", "chains must be with init=noise equal to"),
    "energy": ("--energy convnet", "energy must be mlp for rings, got convnet"),
    "reinit": ("--reinit 2", "reinit must be between 0 and 1, got 2"),
    "device": ("--device tpu", "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    "no data dir": ("--data image-folder", "image-folder needs a folder: pass --data-dir"),
    "no such folder": ("--data image-folder --data-dir nowhere", "nowhere"),
    "no config": ("--config nowhere.toml", "config: no file nowhere.toml"),
    "no run": ("--resume nowhere", "nowhere is not a run"),
    "no cifar10": ("--data cifar10 --data-dir nowhere", "--download"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_give_one_line_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    flags, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    assert command.main(flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_flags_that_do_not_parse_exit_with_2(capsys):
    for flags in (["--steps", "many"], ["--no-such-flag"], ["--sampler", "nuts"]):
        with pytest.raises(SystemExit) as stop:
            command.main(flags)
        assert stop.value.code == 2


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for flag in (
        "data data-dir download energy sampler threshold step-size noise-scale norm refresh steps chains batch-size "
        "init reinit iterations lr seed device precision fused no-fused out resume log-every sample-every save-every "
        "dry-run config"
    ).split():
        assert f"--{flag}" in text, flag
    # the data set's own defaults are shown, and switches are switches
    assert "(default: 40)" in text and "--no-clamp" in text


def test_help_does_not_wait_for_torch():
    code = "import sys; from fastanila import train; sys.argv[1:] = ['--help']\ntry: train.main()\n"
    code += "except SystemExit: sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepsize = 0.1\n", "has an unknown key 'stepsize'"),
        ("step_size = \n", "cannot be read"),
        ('step_size = "big"\n', "step_size must be a number, got 'big'"),
        ("fused = 1\n", "fused must be true or false, got 1"),
        ("steps = 1.5\n", "steps must be an integer, got 1.5"),
        (
            'sampler = "nuts"\n',
            "sampler must be one of anila, anila-mh, langevin, mala, tamed, hmc, gd, anila-coded, shrunk-noise, "
            "got 'nuts'",
        ),
    ],
)
def test_bad_config_files(tmp_path, capsys, text, message):
    (tmp_path / "a.toml").write_text(text)
    assert command.main(["--config", str(tmp_path / "a.toml"), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_out_that_holds_another_run(small_run, capsys):
    assert command.main(["--out", str(small_run)]) == 2
    assert f"out must be a new or empty folder, but {small_run} holds another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--width 32", "width cannot change when a run is resumed"),
        ("--data pinwheel", "data cannot change when a run is resumed"),
        ("--seed 5", "seed cannot change when a run is resumed"),
    ],
)
def test_resuming_with_other_settings(small_run, capsys, flags, message):
    assert command.main(["--resume", str(small_run), *flags.split()]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_checkpoint_of_another_architecture(small_run, tmp_path, capsys):
    twin = tmp_path / "twin"
    shutil.copytree(small_run, twin)
    text = (twin / "config.json").read_text()
    (twin / "config.json").write_text(text.replace('"width": 16', '"width": 32'))
    assert command.main(["--resume", str(twin), "--iterations", "20"]) == 2
    err = capsys.readouterr().err
    assert "does not fit the settings' network" in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_default_job(tmp_path):
    """The rings at full length: 0.06 nats of the entropy, TV 0.12, with the sampler at work."""
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    subprocess.run(
        [sys.executable, "-m", "fastanila.train", "--fused", "--out", str(tmp_path / "run")],
        check=True,
        env=environment,
    )
    report = evaluate.evaluate(fastanila.load(tmp_path / "run"))
    assert report["gap"] < 0.06 and report["tv"] < 0.12
    last = rows(tmp_path / "run")[-1]
    assert last["clip_fraction"] > 0.01 and 0.8 < last["acceptance"] < 0.98


# ------------------------------------------------------------------------------------------------ what is compiled


OTHERS = dict(
    lr=1e-4, iterations=9, seed=5, threshold=3.0, step_size=0.07, ema=0.9, steps=3, reinit=0.1, energy_l2=0.2,
    clip_grad=0.5, data_noise=0.02,
)  # fmt: skip
BEFORE = dict(
    data="8gaussians", iterations=4, batch_size=8, chains=16, width=8, features=4, steps=2, energy_l2=0.1,
    clip_grad=1.0, data_noise=0.01,
)  # fmt: skip


@pytest.mark.parametrize(
    "more", [{}, dict(init="vae", chains=8, latent=3, vae_width=8, kl_weight=0.2, vae_warm_up=2)], ids=["rings", "vae"]
)
def test_no_number_of_a_run_is_a_constant_of_a_graph(monkeypatch, tmp_path, more):
    """What torch.compile would be given, on a GPU where it is most, is the same graphs for every run."""
    graphs = []

    def compiled(function):
        def backend(graph, inputs):
            graphs.append(graph.print_readable(print_output=False))
            return graph.forward

        return torch.compile(function, fullgraph=True, backend=backend)

    monkeypatch.setattr(update_training, "compiles_once", lambda device: True)
    for module in (update_training, stepwise):
        monkeypatch.setattr(module, "compiled", compiled)

    def graphs_of(out, **settings):
        torch._dynamo.reset()
        graphs.clear()
        update = update_training.build_update(job_training.prepare(Settings(**settings, out=str(tmp_path / out))))
        update()
        update()
        return [re.sub(r"#.*|\\b_\\w*_\\d+\\b", "", graph) for graph in graphs]

    before = graphs_of("a", **BEFORE | more)
    changed = OTHERS | (dict(kl_weight=0.7, vae_warm_up=3, vae_lr=0.01) if more else {})
    assert len(before) == (6 if more else 5)  # begin, the transition, learn, teach, settle, follow
    assert graphs_of("b", **BEFORE | more | changed) == before
