"""Runs tests/kernels in Triton's interpreter, in a process of its own: it is chosen when triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastanila.ops import dispatch

KERNELS = Path(__file__).parent / "kernels"
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
#: Tests of each file at least that run and pass there, in every run and of the slow ones: what a GPU alone can run is
#: skipped.
LEAST = {
    "test_whole_chain.py": (50, 2),
    "test_step_rows.py": (40, 40),
    "test_metropolis.py": (40, 40),
    "test_step.py": (40, 40),
    "test_training.py": (1, 2),
}


@pytest.mark.skipif(not dispatch.TRITON, reason="triton is not installed")
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "slow"])
@pytest.mark.parametrize("name", LEAST)
def test_kernels_in_the_interpreter(name, slow):
    result = subprocess.run(
        [*PYTEST, "-m", "slow" if slow else "not slow", str(KERNELS / name)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=7200 if slow else 1200,
    )
    print(result.stdout[-6000:])
    summary = result.stdout.splitlines()[-1]
    assert " passed" in summary and int(summary.split(" passed")[0].split()[-1]) >= LEAST[name][slow], summary
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_no_file_is_left_out():
    """But the one of captures, which an interpreter cannot make."""
    assert {path.name for path in KERNELS.glob("test_*.py")} == {*LEAST, "test_capture.py"}
