"""Runs tests/parity in Triton's interpreter, in a process of its own: it is chosen when triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastanila import ops

HERE = Path(__file__).parent


@pytest.mark.skipif(ops._kernel is None, reason="triton is not installed")
def test_kernels_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "parity")],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(result.stdout[-6000:])
    summary = result.stdout.splitlines()[-1]
    assert " passed" in summary and int(summary.split(" passed")[0].split()[-1]) > 200, summary
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
