"""Training through the kernel gives the numbers of the plain definition: on CUDA, or in Triton's interpreter."""

import json

import pytest
import torch

from fastanila import ops
from fastanila.config import Settings
from fastanila.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not ops.INTERPRETED,
        reason="no CUDA device; tests/test_interpreter.py runs it in Triton's interpreter",
    ),
]


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_twenty_updates(tmp_path, monkeypatch):
    launches = []
    launch = ops._kernel.launch
    monkeypatch.setattr(ops._kernel, "launch", lambda *a, **k: (launches.append(1), launch(*a, **k)))
    common = dict(iterations=20, steps=6, chains=128, batch_size=128, threshold=1.0, log_every=1, sample_every=0)
    for fused in (True, False):
        train(Settings(**common, fused=fused, out=str(tmp_path / str(fused))), say=lambda line: None)
        assert len(launches) == (20 * 6 if fused else 0)  # the kernel, and then not
        launches.clear()
    fused, plain = rows(tmp_path / "True"), rows(tmp_path / "False")
    assert len(fused) == len(plain) == 20
    assert any(row["clip_fraction"] > 0.05 for row in plain)
    for a, b in zip(fused, plain, strict=True):
        for key in a.keys() - {"seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-3), (a["iteration"], key)
