"""`fastanila`: the list of commands, and each command by its name as by its module."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastanila
from fastanila import __main__ as console

PACKAGE = Path(fastanila.__file__).parent


def without_torch(tmp_path, *arguments, torch="raise SystemExit('torch was imported')"):
    """`python -m fastanila` in a process whose torch is that source."""
    (tmp_path / "torch.py").write_text(torch + "\n")
    path = os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])
    return subprocess.run(
        [sys.executable, "-m", "fastanila", *arguments],
        env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip


def ended(main, arguments, capsys):
    """The exit code of a command, and what it wrote."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_every_command_is_listed_in_a_line_without_torch(tmp_path):
    ends = [without_torch(tmp_path, *arguments) for arguments in ((), ("--help",), ("-h",))]
    assert {(end.returncode, end.stdout, end.stderr) for end in ends} == {(0, ends[0].stdout, "")}
    lines = [line.split() for line in ends[0].stdout.splitlines() if line.startswith("  ")]
    # the modules of the package that are run as a program
    run = {p.stem for p in PACKAGE.glob("*.py") if '\nif __name__ == "__main__":' in p.read_text(encoding="utf-8")}
    assert {words[0] for words in lines} == run - {"__main__"} and len(lines) == 5
    assert all(len(words) > 3 for words in lines)


def test_the_help_of_training_needs_no_torch(tmp_path):
    end = without_torch(tmp_path, "train", "--help")
    assert end.returncode == 0 and "--step-size" in end.stdout


def test_the_version(tmp_path):
    end = without_torch(tmp_path, "--version")
    assert (end.returncode, end.stdout) == (0, f"fastanila {fastanila.__version__}\n")


def test_the_citation_has_the_version(pytestconfig):
    lines = (pytestconfig.rootpath / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {fastanila.__version__}" in lines


@pytest.mark.parametrize("arguments", [["tarin", "--fused"], ["--data", "rings"], [""]])
def test_an_unknown_command_is_refused_in_a_line(arguments, tmp_path):
    end = without_torch(tmp_path, *arguments)
    line = f"error: command must be one of train, sample, evaluate, compare, ergodicity, got {arguments[0]!r}\n"
    assert (end.returncode, end.stdout, end.stderr) == (2, "", line)


@pytest.mark.parametrize("name", console.COMMANDS)
def test_a_command_by_its_name_is_its_module(name, capsys):
    module = importlib.import_module(f"fastanila.{name}")
    for arguments in (["--no-such-flag"], ["--help"]):
        expected = ended(module.main, arguments, capsys)
        assert ended(console.main, [name, *arguments], capsys) == expected
        assert expected[0] == (0 if arguments == ["--help"] else 2) and any(expected[1:])


def test_arguments_reach_the_command(tmp_path, capsys, monkeypatch):
    arguments = ["--dry-run", "--no-fused", "--iterations", "3", "--out", str(tmp_path / "run")]
    # neither looks at the process's own arguments
    monkeypatch.setattr(sys, "argv", ["pytest", "--no-such-flag"])
    code, said, _ = ended(console.main, ["train", *arguments], capsys)
    assert code == 0 and '"iterations": 3,' in said
    assert said == ended(importlib.import_module("fastanila.train").main, arguments, capsys)[1]
    monkeypatch.setattr(sys, "argv", ["fastanila", "evaluate", str(tmp_path / "none")])
    code, said, err = ended(console.main, None, capsys)
    assert code == 2 and not said and err.startswith("error: ") and str(tmp_path / "none") in err


@pytest.mark.parametrize("name", console.COMMANDS)
def test_the_help_of_a_command_needs_no_torch(name, tmp_path):
    end = without_torch(tmp_path, name, "--help")
    assert end.returncode == 0 and f"fastanila.{name}" in end.stdout, end.stderr


@pytest.mark.parametrize("name", console.COMMANDS)
def test_ctrl_c_while_importing_leaves_no_traceback(name, tmp_path):
    interrupted = "import signal\nsignal.raise_signal(signal.SIGINT)\nraise SystemExit('went on')"
    needed = {"sample": ["run"], "evaluate": ["run"], "compare": ["--out", "out"]}  # a line that parses
    end = without_torch(tmp_path, name, *needed.get(name, []), torch=interrupted)
    assert (end.returncode, end.stderr) == (130, "interrupted\n")
