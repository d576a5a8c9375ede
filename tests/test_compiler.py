"""What torch's compiler needs: an unwritable cache is named, and is nobody's concern where nothing is compiled."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from fastanila import AniLA, graphs
from fastanila.training import job
from fastanila.training.settings import Settings


@pytest.fixture
def unwritable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "cache")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
    return folder


def test_an_unwritable_cache_is_named(unwritable):
    message = (
        f"cannot write its cache .TORCHINDUCTOR_CACHE_DIR={unwritable}: Not a directory.; set TORCHINDUCTOR_CACHE_"
    )
    with pytest.raises(OSError, match=message):
        graphs.compiled(lambda x: x + 1)
    with pytest.raises(OSError, match=message):
        job.prepare(Settings(fused=True))
    with pytest.raises(OSError, match=message):
        AniLA().run(lambda x: x.square().sum(1), torch.zeros(3, 2), steps=1, seed=0)
    job.prepare(Settings(fused=False))
    assert AniLA().run(lambda x: x.square().sum(1), torch.zeros(3, 2), steps=1, seed=0, compile=False).shape == (3, 2)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_folder_that_is_there_and_cannot_be_written(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/self")
    with pytest.raises(OSError, match="TORCHINDUCTOR_CACHE_DIR=/proc/self: "):
        graphs.check_cache()


def test_a_plain_run_needs_no_cache(unwritable):
    """In a fresh process, in which torch's optimizer imports the compiler."""
    code = "import os; from fastanila.training.loop import prepare; from fastanila.training.config import Settings\n"
    code += "prepare(Settings(fused=False)); print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (end.returncode, end.stdout.strip()) == (0, unwritable), end.stderr


def test_the_line_that_says_nothing_is_left_out(caplog):
    logger = logging.getLogger("torch.utils.cpp_extension")
    caplog.set_level(logging.WARNING)
    logger.addHandler(caplog.handler)  # torch's loggers do not hand on
    try:
        with graphs.quiet():
            logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
            logger.warning("There is no g++")
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
    finally:
        logger.removeHandler(caplog.handler)
    said = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert said == ["There is no g++", "No CUDA runtime is found, using CUDA_HOME='/usr/local/cuda'"]
