"""Runs in slices of time, and what a run does when it diverges."""

import itertools
import types

import pytest
import torch

from fastanila import train as command
from fastanila.training import checkpoint, loop
from fastanila.training.settings import Settings
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
