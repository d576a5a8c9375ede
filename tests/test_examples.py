"""Each example runs, in small, and writes its picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

SMALL = {
    "own_loop": "--steps 25",
    "own_energy": "--draws 30 --chains 16 --no-compile",
    "own_training": "--iterations 6 --no-fused --run run",
    "image_folder": "--iterations 3 --no-fused --run run",
}


def test_every_example_is_tried():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == SMALL.keys()


@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs_and_is_short(name, tmp_path):
    if name == "own_energy":
        pytest.importorskip("arviz")
    file = ROOT / "examples" / f"{name}.py"
    assert len(file.read_text().splitlines()) < 60
    command = [sys.executable, str(file), *SMALL[name].split(), "--out", "picture.png"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the picture is in picture.png" in done.stdout
    with Image.open(tmp_path / "picture.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 3
