"""The folder of a run: names taken once, half-made ones used again, and nothing of a user's lost."""

import concurrent.futures
import os
import signal
import threading

import pytest

from fastanila import files
from fastanila import train as command
from fastanila.cli import exits
from fastanila.training import checkpoint, config, loop, metrics, run, run_directory, several
from fastanila.training import job as job_training
from fastanila.training.settings import Settings
from run_files import final, numbers, quiet, rows

TINY = dict(
    iterations=3, steps=2, batch_size=16, chains=16, width=8, features=4, log_every=1, sample_every=0, fused=False
)


def test_of_several_each_makes_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    together = threading.Barrier(8)

    def make(_):
        together.wait()
        return run_directory.make(run_directory.names("rings"))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = set(pool.map(make, range(8)))
    assert {path.name for path in made} == {"rings", *(f"rings-{number}" for number in range(2, 9))}


def test_trainings_prepared_together_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [job_training.prepare(Settings(**TINY, seed=seed)) for seed in range(3)]
    assert len({job.directory for job in jobs}) == 1  # as they see it, none has begun
    for job in jobs:
        loop.run(job, say=lambda line: None)
    for seed, name in enumerate(("rings", "rings-2", "rings-3")):
        settings = run.read_settings(tmp_path / "runs" / name)
        assert settings.seed == seed and settings.out == f"runs/{name}"
        assert len(rows(tmp_path / "runs" / name)) == 3


def test_of_trainings_prepared_for_the_same_out_one_goes_on(tmp_path):
    jobs = [job_training.prepare(Settings(**TINY, out=str(tmp_path / "run"))) for _ in range(2)]
    loop.run(jobs[0], say=lambda line: None)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(run_directory.Taken, match="holds another run"):
        loop.run(jobs[1], say=lambda line: None)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.skipif(run_directory.fcntl is None, reason="no locks on this system")
def test_nobody_trains_in_a_folder_in_which_somebody_does(tmp_path, capsys):
    directory = tmp_path / "run"
    quiet(Settings(**TINY, out=str(directory)))
    with run_directory.locked(directory):
        assert command.main(["--resume", str(directory), "--iterations", "5"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: another process trains in {directory}"
    assert len(rows(directory)) == 3
    assert command.main(["--resume", str(directory), "--iterations", "5"]) == 0


# ------------------------------------------------------------------------------------------- what a failed start leaves


class Failed(Exception):
    pass


def fails(*_, **__):
    raise Failed


def test_a_run_that_fails_in_its_first_update_can_be_resumed_and_begun_again(tmp_path, monkeypatch):
    settings = Settings(**TINY, out=str(tmp_path / "run"))
    for _ in range(2):  # the second begins where the first has failed
        with monkeypatch.context() as patched:
            patched.setattr(loop, "build_update", lambda job: fails)
            with pytest.raises(Failed):
                quiet(settings)
        assert checkpoint.load_latest(tmp_path / "run" / "checkpoints")[1]["iteration"] == 0
    quiet(Settings(**TINY), resume=tmp_path / "run")
    quiet(Settings(**TINY, out=str(tmp_path / "whole")))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    a, b = final(tmp_path / "run"), final(tmp_path / "whole")
    assert all((a[name] == b[name]).all() for name in b)


@pytest.mark.parametrize("where", ["mkdir", "config", "checkpoint"])
def test_a_run_that_fails_while_it_begins_leaves_its_name_free(tmp_path, monkeypatch, where):
    settings = Settings(**TINY, out=str(tmp_path / "run"))
    with monkeypatch.context() as patched:
        if where == "mkdir":
            patched.setattr(loop, "begin", fails)
        elif where == "config":
            patched.setattr(files, "write_text", fails)
        else:
            patched.setattr(job_training, "save", fails)
        with pytest.raises(Failed):
            quiet(settings)
    assert quiet(settings).iteration == 3


@pytest.mark.parametrize(
    "name", ["notes.txt", "config.json", "config of another.json", "samples/mine.png", "metrics.jsonl", "checkpoints"]
)
def test_nothing_a_user_made_is_lost(tmp_path, name, capsys):
    directory = tmp_path / "run"
    file = directory / name.replace("config of another", "config")
    file.parent.mkdir(parents=True)
    content = '{"data": "rings"}\n'
    if "another" in name:  # a whole config.json, of a run elsewhere
        content = config.dump(config.resolve(Settings(**TINY, out=str(tmp_path / "elsewhere"))))
    file.write_text(content)
    assert command.main(["--out", str(directory), "--iterations", "1", "--no-fused"]) == 2
    err = capsys.readouterr().err
    assert f"out must be a new or empty folder, but {directory} holds other files (" in err and err.count("\n") == 1
    assert file.read_text() == content and [path for path in directory.rglob("*") if path.is_file()] == [file]


def test_compare_deletes_nothing_where_a_run_has_no_checkpoint(tmp_path, monkeypatch):
    directory = tmp_path / "mala-seed0"
    directory.mkdir()
    (directory / "thesis.tex").write_text("all of it")

    with pytest.raises(run_directory.Taken, match="holds other files"):
        several.train(config.resolve(Settings(**TINY)), directory)
    assert (directory / "thesis.tex").read_text() == "all of it"


# ------------------------------------------------------------------------------------------ what ends a run in between


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals on this system")
@pytest.mark.parametrize("name, code", [("SIGHUP", 129), ("SIGINT", 130), ("SIGTERM", 143), ("SIGPIPE", 141)])
def test_what_ends_a_run_leaves_a_checkpoint(tmp_path, monkeypatch, name, code, capsys):
    lines = []

    def say(line):
        lines.append(line)
        if len(lines) == 3:
            if name == "SIGPIPE":
                raise BrokenPipeError
            signal.raise_signal(signal.Signals[name])

    monkeypatch.setattr(exits, "say", say)
    directory = tmp_path / "run"
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items() if k not in ("fused", "iterations")]
    assert command.main([*flags, "--no-fused", "--iterations=50", f"--out={directory}"]) == code
    made = rows(directory)[-1]["iteration"]
    assert made < 50 and checkpoint.load_latest(directory / "checkpoints")[1]["iteration"] == made
    assert f"{name}: stopped after update {made}, saved; go on with --resume {directory}" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals on this system")
def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with loop.caught_signals() as caught:
            signal.raise_signal(signal.SIGHUP)
        assert caught == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("what", ["metrics", "checkpoint", "figure", "output"])
def test_a_full_disk_ends_in_one_line_that_says_how_to_go_on(tmp_path, monkeypatch, what):
    directory, said = tmp_path / "run", []

    def full(*_, **__):
        raise OSError(28, os.strerror(28), None if what == "output" else str(directory / "file"))

    with monkeypatch.context() as patched:
        if what == "metrics":
            patched.setattr(metrics.Metrics, "write", full)
        elif what == "figure":
            patched.setattr(loop, "picture", full)
        elif what == "output":
            patched.setattr("builtins.print", lambda *a, file=None, **k: file or full())
        else:
            saved = checkpoint.save_numbered
            patched.setattr(checkpoint, "save_numbered", lambda d, n, *a, **k: full() if n else saved(d, n, *a, **k))
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items() if k not in ("fused", "save_every")]
        patched.setattr(exits, "complain", said.append)
        assert command.main([*flags, "--no-fused", "--save-every=1", f"--out={directory}"]) == 2
    (line,) = said
    kept = checkpoint.load_latest(directory / "checkpoints")[1]["iteration"]
    subject = "standard output" if what == "output" else directory / "file"
    assert line == f"error: {subject}: No space left on device; --resume {directory} goes on from update {kept}"
    assert kept == {"metrics": 1, "checkpoint": 0, "figure": 3, "output": 0}[what]
    assert quiet(Settings(**TINY), resume=directory).iteration == 3


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_folder_that_cannot_be_written_is_refused_ahead_of_the_work(tmp_path, flags, capsys):
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "run"
    assert command.main(["--no-fused", "--iterations", "2", "--out", str(where), *flags]) == 2
    assert capsys.readouterr().err == f"error: {where}: cannot be written (Not a directory)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    if os.path.isdir("/proc/self"):
        assert command.main(["--no-fused", "--out", "/proc/nope", *flags]) == 2
        assert "/proc/nope: cannot be written" in capsys.readouterr().err
