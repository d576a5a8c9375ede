"""How commands end: the documented exit codes, a line of error, Ctrl-C while importing; paths as people write them."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastanila
from fastanila import compare, ergodicity, evaluate, files, sample, train
from fastanila.cli import exits
from fastanila.training import checkpoint, config, several
from fastanila.training.settings import Settings
from run_files import quiet

COMMANDS = ("train", "sample", "evaluate", "compare", "ergodicity")
NEEDED = {"sample": ["run"], "evaluate": ["run"], "compare": ["--out", "x"]}  #: arguments without which none starts
TINY = dict(
    iterations=2, steps=2, batch_size=16, chains=16, width=8, features=4, log_every=1, sample_every=0, fused=False
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with a run, ~/run."""
    home = tmp_path_factory.mktemp("home")
    quiet(Settings(**TINY, out=str(home / "run")))
    return home


def ended(code: str, **options) -> subprocess.CompletedProcess:
    """A process in which a command's work is ``code``; nothing of torch is imported."""
    program = f"import sys\nfrom fastanila.cli import exits\ndef work():\n {code}\nsys.exit(exits.exit_code(work))"
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", program], text=True, check=False, env=buffered, **streams)


@pytest.mark.parametrize(
    "code, expected, line",
    [
        ("return 0", 0, ""),
        ("return exits.DIVERGED", 3, ""),
        ("raise exits.Refused('steps must be')", 2, "error: steps must be"),
        ("raise FileNotFoundError('x is not a run')", 2, "error: x is not a run"),
        ("open('/no/such/file')", 2, "error: /no/such/file: No such file or directory"),
        ("raise OSError(28, 'No space left on device', '/there')", 2, "error: /there: No space left on device"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("bytearray(1 << 62)", 2, "error: there is not enough memory"),
        (
            "raise RuntimeError('CUDA out of memory. Tried')",
            2,
            "error: there is not enough memory (CUDA out of memory.",
        ),
        ("import signal; signal.raise_signal(signal.SIGINT)", 130, "interrupted"),
    ],
)
def test_every_end_has_its_exit_code_and_at_most_one_line(code, expected, line):
    end = ended(code)
    assert end.returncode == expected and end.stderr.startswith(line) and end.stderr.count("\n") == bool(line)


def test_a_fault_of_the_program_keeps_its_traceback():
    end = ended("raise RuntimeError('shapes differ')")
    assert end.returncode == 1 and "Traceback" in end.stderr and "shapes differ" in end.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
@pytest.mark.parametrize("code", ["exits.say('x' * 99_999)", "print('x' * 99)\n return 0", "print('x'); sys.exit(0)"])
def test_a_reader_that_has_gone_is_no_error(code):
    reading, writing = os.pipe()
    os.close(reading)
    end = ended(code, stdout=writing)
    os.close(writing)
    assert end.returncode == 141 and end.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("code", ["exits.say('x')", "print('x')\n return 0"])
def test_an_output_on_a_full_disk_is_named(code):
    with open("/dev/full", "w") as full:
        end = ended(code, stdout=full)
        assert (end.returncode, end.stderr) == (2, "error: standard output: No space left on device\n")
        assert ended("raise exits.Refused('no')", stderr=full).returncode == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_while_importing_leaves_no_traceback(name, tmp_path):
    """With a torch that is interrupted as soon as it is imported."""
    (tmp_path / "torch.py").write_text(
        "import signal\nsignal.raise_signal(signal.SIGINT)\nraise SystemExit('went on')\n"
    )
    here = os.pathsep.join([str(tmp_path), str(Path(fastanila.__file__).parents[1])])
    end = subprocess.run(
        [sys.executable, "-m", f"fastanila.{name}", *NEEDED.get(name, ())],
        env=os.environ | {"PYTHONPATH": here}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (end.returncode, end.stderr) == (130, "interrupted\n")


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("where", ["a file's place", "proc"])
def test_what_cannot_be_written_is_told_ahead_of_the_work(home, tmp_path, where, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "x" if where != "proc" else Path("/proc/nope")
    if where == "proc" and not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc")
    for work in ((ergodicity, "family"), (several, "train")):
        monkeypatch.setattr(*work, lambda *_: pytest.fail("worked for nothing"))
    monkeypatch.setitem(sample.MODES, "samples", lambda *_: pytest.fail("worked for nothing"))
    for main, flags in (
        (sample.main, [str(home / "run"), "--out", str(out / "s.png")]),
        (ergodicity.main, ["--out", str(out)]),
        (compare.main, ["--out", str(out)]),
    ):
        assert main(flags) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {out}") and err.count("\n") == 1


def test_a_sample_that_is_a_folder_is_refused(home, tmp_path, capsys):
    (tmp_path / "s.png").mkdir()
    assert sample.main([str(home / "run"), "--out", str(tmp_path / "s.png")]) == 2
    assert capsys.readouterr().err == f"error: out must be a file, but {tmp_path / 's.png'} is a folder\n"


def test_a_write_that_fails_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(OSError) as failed:
        files.write_text(tmp_path / "none" / "a.json", "x")
    assert failed.value.filename == str(tmp_path / "none" / "a.json")


def test_a_checkpoint_that_is_deleted_while_it_is_read_gives_way_to_the_next(tmp_path, monkeypatch):
    for number in (1, 2):
        checkpoint.save_numbered(tmp_path, number, {"x": torch.zeros(1)}, {"iteration": number})
    load = checkpoint.load

    def late(path, device):
        if path.name == "00000002.safetensors":  # the run goes on, twice
            for number in (3, 4):
                checkpoint.save_numbered(tmp_path, number, {"x": torch.zeros(1)}, {"iteration": number})
        return load(path, device)

    monkeypatch.setattr(checkpoint, "load", late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load_latest(tmp_path)[1]["iteration"] == 4


# ------------------------------------------------------------------------------------------- paths as people write them


def test_a_tilde_is_the_home_folder_everywhere(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (home / "a.toml").write_text('out = "~/from-toml"\ndata_dir = "~/images"\n')
    settings, *_ = train.parse(["--config", "~/a.toml", "--out=~/again"])
    assert settings.out == "~/again" and settings.data_dir == "~/images"
    settings, *_ = train.parse(["--config=~/a.toml"])
    settings = config.resolve(settings)
    assert settings.out == str(home / "from-toml") and settings.data_dir == str(home / "images")
    assert train.main(["--resume=~/run", "--dry-run"]) == 0
    assert train.main(["--iterations=1", "--no-fused", "--steps=1", "--out=~/out", "--sample-every=0"]) == 0
    assert fastanila.load("~/out").iteration == 1
    assert sample.main(["~/run", "--out=~/s.npz", "--no-fused", "--steps=1"]) == 0 and (home / "s.npz").is_file()
    assert evaluate.main(["~/run"]) == 0
    assert ergodicity.main(["--run=~/run", "--out=~/law", "--resolution=12"]) == 0
    assert (home / "law" / "ergodicity.json").is_file()
    monkeypatch.setattr(several, "train", lambda settings, directory, threads: False)
    assert compare.main(["--out=~/compared", "--iterations=2"]) == 0 and (home / "compared" / "compare.png").is_file()
    assert not list(tmp_path.iterdir())


def test_paths_that_cannot_be():
    with pytest.raises(ValueError, match=r"^out must be a path, got ''$"):
        config.resolve(Settings(out=""))
    with pytest.raises(ValueError, match=r"^data_dir: there is no such home folder, got '~nobody-here/x'"):
        config.resolve(Settings(data_dir="~nobody-here/x"))
    assert config.path_of("out", "./~x") == Path.cwd() / "~x"
    assert config.path_of("out", "a~b") == Path("a~b")


# ------------------------------------------------------------------------------------------------------ config files


def test_only_a_runs_own_config_drops_its_out(home, tmp_path):
    assert train.parse(["--config", str(home / "run" / "config.json")])[0].out is None
    for name in ("my-config.json", "config.json", "CONFIG.JSON"):
        (tmp_path / name).write_text(json.dumps({"out": "mine", "steps": 3}))
        settings = train.parse(["--config", str(tmp_path / name)])[0]
        assert settings.out == "mine" and settings.steps == 3, name


@pytest.mark.parametrize(
    "name, text", [("a.toml", "batch-size = 8\nbatch_size = 16\n"), ("a.json", '{"batch_size": 8, "batch_size": 16}')]
)
def test_a_setting_that_a_file_has_twice(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"a\.\w+ has batch_size twice: 8 and 16$"):
        config.read(tmp_path / name)


def test_out_with_an_upper_case_ending(home, tmp_path):
    assert sample.main([str(home / "run"), "--no-fused", "--steps=1", "--out", str(tmp_path / "S.NPZ")]) == 0
    assert (tmp_path / "S.NPZ").read_bytes()[:2] == b"PK"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_what_does_not_parse_wait_for_no_torch(name, tmp_path):
    """With a torch that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch')\n")
    here = os.pathsep.join([str(tmp_path), str(Path(fastanila.__file__).parents[1])])
    for flags, expected in ((["--help"], 0), (["--no-such-flag"], 2)):
        if name == "train" and expected:
            continue  # its flags are those of settings, which are checked beside the data
        end = subprocess.run(
            [sys.executable, "-m", f"fastanila.{name}", *flags],
            env=os.environ | {"PYTHONPATH": here}, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert end.returncode == expected and end.stderr.startswith("usage: ") == bool(expected), end.stderr
        assert end.stdout.startswith("usage: ") != bool(expected)


def test_command_knows_no_torch():
    code = "import sys, fastanila.cli.exits\nsys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert exits.FAILED == 2
