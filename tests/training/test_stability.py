"""Runs in slices of time, and what a run does when it diverges."""

import dataclasses
import itertools
import shutil
import types

import pytest
import torch

from fastanila import train as command
from fastanila.training import checkpoint, config, contents, loop
from fastanila.training import job as job_training
from fastanila.training import update as update_training
from fastanila.training.rollback import roll_back
from fastanila.training.settings import Settings
from fastanila.training.watch import Watch
from run_files import final, numbers, quiet, rows

SMALL = dict(
    sampler="anila", step_size=0.01, iterations=12, steps=4, batch_size=64, chains=128, width=16, features=8,
    log_every=1, sample_every=0, save_every=5, fused=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    quiet(Settings(**SMALL, out=str(directory)))
    return directory


def same(a, b):
    """Whether two runs' rows, but for the seconds, and their last checkpoints are the same, bit for bit."""
    left, right = final(a), final(b)
    equal = left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    return equal and numbers(a) == numbers(b)


# ---------------------------------------------------------------------------------------------------- slices of time


def ticking(monkeypatch, seconds=1.0):
    """A clock for the loop that goes on by so many seconds whenever it is read."""
    times = itertools.count(0.0, seconds)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))


def test_a_run_in_slices_has_the_numbers_of_a_run_in_one_go(tmp_path, monkeypatch, whole):
    ticking(monkeypatch)
    out, stops = tmp_path / "run", []
    for resume in (None, out, out, out):
        said, saved = [], []
        settings = Settings(**SMALL, out=None if resume else str(out))
        run = loop.train(settings, resume, said.append, minutes=0.15, on_checkpoint=saved.append)
        assert (out / "figure.png").exists() and saved[-1] == checkpoint.latest(out / "checkpoints")
        assert int(saved[-1].stem) == run.iteration
        stops.append(run.iteration)
        if run.iteration == 12:
            break
        assert said[-1] == f"stopped after 0.15 minutes at update {run.iteration} of 12; go on with --resume {out}"
    assert stops == [4, 8, 12] and said[-1].startswith("done: 12 updates")
    assert same(out, whole)


def test_minutes_on_the_command_line(tmp_path, capsys, whole):
    out = tmp_path / "run"
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "fused"] + ["--no-fused"]
    assert command.main([*flags, "--out", str(out), "--minutes", "1e-9"]) == 0
    assert f"stopped after 1e-09 minutes at update 1 of 12; go on with --resume {out}" in capsys.readouterr().out
    assert '"minutes"' not in (out / "config.json").read_text()  # no setting: the next slice may be of another length
    assert [row["iteration"] for row in rows(out)] == [1]
    assert command.main(["--resume", str(out), "--minutes", "60"]) == 0
    assert "done: 12 updates" in capsys.readouterr().out
    assert same(out, whole)
    for bad in ("0", "-1", "nan"):
        assert command.main([*flags, "--out", str(tmp_path / "bad"), "--minutes", bad]) == 2
        assert "minutes must be positive" in capsys.readouterr().err
    with pytest.raises(ValueError, match="minutes must be positive"):
        loop.train(Settings(**SMALL, out=str(tmp_path / "bad")), minutes=0)
    assert not (tmp_path / "bad").exists()


# --------------------------------------------------------------------------------------------------------- rollbacks


BACK = SMALL | dict(on_divergence="rollback", iterations=24, seed=8 * 10**18)  # whose first other seed is below 2^63


def breaking(monkeypatch, *updates):
    """Update ``updates[n]`` is not finite after n rollbacks."""

    def build(job):
        made = update_training.build_update(job)

        def update():
            n = len(job.rolled_back)
            if n < len(updates) and int(job.made) + 1 == updates[n]:
                job.broken.fill_(True)  # as an update does that finds its numbers so
            return made()

        return update

    monkeypatch.setattr(loop, "build_update", build)


def state(directory):
    return checkpoint.load_latest(directory / "checkpoints")[1]


def bare(rows):
    """Less what a rollback adds to them."""
    return [{k: v for k, v in row.items() if k not in ("rollback", "diverged")} for row in rows]


def test_a_rollback_goes_on_as_a_run_of_half_the_rate_and_another_seed_does(tmp_path, monkeypatch):
    """By another way: the checkpoint in a run whose settings have them."""
    said, out, twin = [], tmp_path / "run", tmp_path / "twin"
    breaking(monkeypatch, 14)
    loop.train(Settings(**BACK, out=str(out)), say=said.append)
    (line,) = [line for line in said if line.startswith("rollback")]
    where = "diverged at update 14; goes on from update 10 as with --lr 0.00025, and with new noise"
    assert line == f"rollback 1 of at most 3: {where}"
    (made,) = state(out)["rollbacks"]
    assert made == {"diverged": 14, "back_to": 10, "seed": made["seed"], "rate": 0.5}
    assert made["seed"] != BACK["seed"]
    found = rows(out)
    assert [row["iteration"] for row in found] == list(range(1, 25))
    assert [row.get("rollback") for row in found] == [None] * 10 + [1] * 14
    assert all(row["diverged"] == 14 for row in found[10:])

    monkeypatch.undo()
    quiet(Settings(**BACK | dict(save_every=10), out=str(twin)))
    (twin / "checkpoints" / "00000024.safetensors").unlink()
    (twin / "checkpoints" / "00000020.safetensors").unlink()
    settings = job_training.read_settings(twin)
    settings = dataclasses.replace(settings, seed=made["seed"], lr=settings.lr / 2)
    (twin / "config.json").write_text(config.dump(settings))
    quiet(settings, resume=twin)
    assert bare(numbers(out)) == numbers(twin)
    a, b = final(out), final(twin)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    quiet(Settings(**BACK, out=str(tmp_path / "well")))  # teeth: neither was without effect
    assert bare(numbers(out))[10:] != numbers(tmp_path / "well")[10:]


def test_a_run_with_rollbacks_in_slices_has_the_numbers_of_one_in_one_go(tmp_path, monkeypatch):
    """Stopped wherever: ahead of a divergence, right after a rollback, and with a checkpoint between."""
    monkeypatch.setattr(loop, "picture", lambda job, path: None)  # takes longest
    breaking(monkeypatch, 14, 13, 24)
    whole = tmp_path / "whole"
    quiet(Settings(**BACK, out=str(whole)))
    ways = [(made["diverged"], made["back_to"]) for made in state(whole)["rollbacks"]]
    assert ways == [(14, 10), (13, 5), (24, 20)]  # again from the same checkpoint: the one before
    for length in (0.15,):
        out = tmp_path / str(length)
        ticking(monkeypatch)
        run = loop.train(Settings(**BACK, out=str(out)), say=lambda line: None, minutes=length)
        while run.iteration < BACK["iterations"]:
            run = loop.train(Settings(**BACK), out, say=lambda line: None, minutes=length)
        monkeypatch.setattr(loop, "time", __import__("time"))
        assert same(out, whole) and state(out)["rollbacks"] == state(whole)["rollbacks"]
    # killed where only older checkpoints are left: what came after is made again
    out = tmp_path / "killed"
    shutil.copytree(whole, out)
    (out / "checkpoints" / "00000024.safetensors").unlink()
    quiet(Settings(**BACK), resume=out)
    assert same(out, whole)


def test_after_the_last_rollback_a_run_stops_as_ever(tmp_path, monkeypatch, capsys):
    breaking(monkeypatch, *[7] * 10)
    out = tmp_path / "run"
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in BACK.items() if k != "fused"] + ["--no-fused"]
    assert command.main([*flags, "--rollbacks", "2", "--out", str(out)]) == 3
    assert "diverged at update 7 after 2 rollbacks" in capsys.readouterr().err
    assert state(out)["iteration"] == 6 and [made["back_to"] for made in state(out)["rollbacks"]] == [5, 0]
    assert [row["iteration"] for row in rows(out)] == list(range(1, 7))
    # it may be given more of them; then it goes on from where it was
    assert command.main(["--resume", str(out), "--rollbacks", "9"]) == 3
    assert "diverged at update 7 after 9 rollbacks" in capsys.readouterr().err
    # a run that was to stop, and did, may go back to what is there
    breaking(monkeypatch, 7)
    assert command.main([*flags[:-1], "--on-divergence", "stop", "--no-fused", "--out", str(tmp_path / "stop")]) == 3
    assert "diverged at update 7: " in capsys.readouterr().err and "rollback" not in rows(tmp_path / "stop")[-1]
    assert command.main(["--resume", str(tmp_path / "stop"), "--on-divergence", "rollback"]) == 0
    assert state(tmp_path / "stop")["rollbacks"][0]["back_to"] == 6
    assert command.main([*flags, "--on-divergence", "stop", "--rollbacks", "2", "--out", str(tmp_path / "x")]) == 2
    assert "rollbacks has no effect with on_divergence=stop" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    job = job_training.prepare(Settings(**BACK, out=str(tmp_path / "run")))
    with job_training.run_directory_of(job):
        job_training.begin(job)
        update = update_training.build_update(job)
        for job.iteration in range(1, 5):
            update()
            job_training.save(job, good=True)
        assert job.good == [2, 3, 4]
        (tmp_path / "run" / "checkpoints" / "00000004.safetensors").write_bytes(b"torn")
        with pytest.warns(UserWarning, match="passed over"):
            assert "from update 3" in roll_back(job, 5)
        assert job.good == [2, 3] and state(tmp_path / "run")["iteration"] == 3
        for name in ("00000002", "00000003"):
            (tmp_path / "run" / "checkpoints" / f"{name}.safetensors").unlink()
        before = {k: v.clone() for k, v in job.ebm.module.state_dict().items()}
        with pytest.warns(UserWarning, match="passed over"):
            assert roll_back(job, 5) is None
        assert len(job.rolled_back) == 1 and all(
            torch.equal(v, before[k]) for k, v in job.ebm.module.state_dict().items()
        )


@pytest.mark.parametrize("init", ["persistent", "vae"])
def test_a_rollback_changes_values_where_they_are(tmp_path, init):
    """A captured update reads its tensors at their addresses, and a compiled one holds none of their numbers."""

    def tensors(job):
        found = {
            "seed": job.seed,
            "factor": job.lr_factor,
            "chains": job.chains,
            "made": job.made,
            "broken": job.broken,
        }
        found |= {f"start.{k}": v for k, v in job.start.tensors().items()} | {"start.seed": job.start.seed}
        for i, learner in enumerate(job.learners):
            found |= {f"{i}.{k}": v for k, v in learner.module.state_dict().items()}
            found |= {f"{i}.ema.{k}": v for k, v in learner.average.state_dict().items()}
            for j, of in enumerate(learner.optimizer.state.values()):
                found |= {f"{i}.{j}.{k}": v for k, v in of.items()}
        return found

    own = dict(chains=64, latent=2, vae_width=8, vae_warm_up=1) if init == "vae" else {}
    job = job_training.prepare(Settings(**BACK | own | dict(init=init), out=str(tmp_path / "run")))
    with job_training.run_directory_of(job):
        job_training.begin(job)
        update = update_training.build_update(job)
        for job.iteration in (1, 2):
            update()
        job.broken.fill_(True)
        before = {k: v.data_ptr() for k, v in tensors(job).items()}
        first = contents.unpacked(*checkpoint.load(tmp_path / "run" / "checkpoints" / "00000000.safetensors"))
        assert roll_back(job, 3) is not None
        after = tensors(job)
        assert {k: v.data_ptr() for k, v in after.items()} == before
        assert int(job.made) == job.iteration == 0 and not job.broken and job.lr_factor == 0.5
        assert all(torch.equal(after[f"0.{k}"], v) for k, v in first.energy.parameters.items())
        assert all(
            (after[k] == 0).all() for k in after if k.endswith(("exp_avg", "exp_avg_sq", "step"))
        )  # of a new Adam
        assert job.start.seed is job.seed and job.seed != job.settings.seed
        # and what it goes on with is what a job prepared anew from the checkpoint does
        fresh = job_training.prepare(Settings(**BACK | own | dict(init=init)), resume=tmp_path / "run")
        anew = update_training.build_update(fresh)
        for _ in range(2):
            update(), anew()
        assert all(torch.equal(v, tensors(fresh)[k]) for k, v in tensors(job).items())


@pytest.mark.slow
def test_nothing_is_compiled_anew_after_a_rollback(tmp_path, monkeypatch, graphs):
    """Of an update that is compiled as a whole, as it is on a GPU."""
    monkeypatch.setattr(update_training, "compiles_once", lambda device: True)
    breaking(monkeypatch, 7)
    compiled = []
    settings = Settings(**BACK | dict(fused=True, iterations=9), out=str(tmp_path / "run"))
    loop.train(settings, say=lambda line: None, on_log=lambda row: compiled.append(len(graphs)))
    assert len(compiled) == 6 + 4 and compiled[2] > 1 and set(compiled[2:]) == {compiled[2]}
    assert state(tmp_path / "run")["rollbacks"][0]["back_to"] == 5


# ---------------------------------------------------------------------------------------- what announces a divergence


def row(iteration, gap, **more):
    return dict(iteration=iteration, energy_data=1.0, energy_chains=1.0 + gap, clip_fraction=0.1, **more)


def watched(**settings):
    return Watch(config.resolve(Settings(**settings)))


def test_a_gap_that_runs_away_is_told_once_and_ahead_of_the_end():
    """Rows as of rings at --lr 0.1, from its 500th update on, where it diverged."""
    gaps = [-0.85, -0.66, 0.06, -3.8, -8.3, -3.9, -8.1, -2.9, -2.5, -3.8, 3.1, 17.5, 53.6, 122.6, 355.8, 355.2, 587.8]
    watch, told, states = watched(), [], []
    for i in range(100):
        told += watch.see(row(3 * i + 1, (-1) ** i * (0.5 + 0.4 * (i % 3))))
    for i, gap in enumerate(gaps):
        told += watch.see(row(501 + 3 * i, gap))
        states.append((watch.running_away, watch.diverged))
    (line,) = told
    assert line.startswith("warning: update 540: the energies run away (gap 123,") and "lower --lr (now 0.0005)" in line
    assert "--on-divergence rollback" in line
    assert [away for away, _ in states] == [False] * 11 + [True] * 6  # no checkpoint of these is gone back to
    assert [lost for _, lost in states] == [False] * 15 + [True] * 2
    # the same from the file, of a run that is resumed; in which what was not finite is null
    again = watched()
    everything = [row(3 * i + 1, (-1) ** i * (0.5 + 0.4 * (i % 3))) for i in range(100)]
    everything += [row(501 + 3 * i, gap) for i, gap in enumerate(gaps)]
    assert again.recall(everything) == told and again.running_away and again.diverged
    assert not watched().recall(everything[:-6])
    assert (
        len(watched().recall(everything[:-6] + [row(540 + i, 0.0) | dict(energy_chains=None) for i in range(5)])) >= 1
    )


def test_what_is_no_divergence_is_not_told():
    watch = watched()
    for i in range(1, 400):  # one in a while, a gap that grows slowly, and another level of the energies
        gap = 40.0 if i % 3 == 0 else 1.0
        assert watch.see(row(i, gap) | dict(energy_data=1e3, energy_chains=1e3 + gap)) == [] and not watch.diverged
    watch = watched(data="digits")
    for i in range(1, 400):
        assert watch.see(row(i, 0.002 * 1.02**i)) == [] and not watch.running_away
    watch = watched()
    for i in range(1, 90):  # ahead of which nothing is known
        assert watch.see(row(i, 1e3 if i > 60 else 0.1)) == []


def test_chains_that_no_longer_follow_the_energy_are_told():
    watch = watched(data="digits")
    well, bad = row(200, 0.3), row(200, 0.3) | dict(clip_fraction=0.95)
    told = [watch.see(one) for one in [bad] * 4 + [well] + [bad] * 9]
    assert [len(lines) for lines in told] == [0] * 9 + [1] + [0] * 4
    assert "95% of the elements are clipped" in told[9][0] and "raise --threshold (now 0.05)" in told[9][0]


@pytest.fixture(scope="module")
def diverging():
    """Plain Langevin steps that are too long for the energy that they help to learn."""
    own = dict(sampler="langevin", step_size=0.5, lr=0.03, batch_size=32, chains=32, iterations=400, log_every=10)
    return SMALL | own | dict(save_every=10)


def test_a_real_divergence_is_told_of_ahead(tmp_path, diverging):
    said = []
    with pytest.raises(job_training.Diverged) as stop:
        loop.train(Settings(**diverging, out=str(tmp_path / "run")), say=said.append)
    told = [line for line in said if "the energies run away" in line]
    assert told, said
    ended = int(str(stop.value).split()[3].rstrip(":"))
    assert int(told[0].split()[2].rstrip(":")) < ended


@pytest.mark.slow
def test_a_real_divergence_is_rolled_back(tmp_path, diverging):
    said = []
    settings = Settings(**diverging | dict(on_divergence="rollback", rollbacks=9, iterations=200))
    loop.train(dataclasses.replace(settings, out=str(tmp_path / "run")), say=said.append)
    back = state(tmp_path / "run")["rollbacks"]
    assert back and all(a["back_to"] < a["diverged"] - 10 for a in back)  # not to one on its way out
    last = rows(tmp_path / "run")
    assert last[-1]["iteration"] == 200 and last[-1]["lr"] == pytest.approx(0.03 / 200 * 0.5 ** len(back))
