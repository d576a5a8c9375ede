"""Training through the kernel gives the numbers of the plain definition: on CUDA, or in Triton's interpreter."""

import json

import pytest
import torch

from fastanila import metropolis, ops, trajectory, updates
from fastanila.config import Settings
from fastanila.training import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not ops.INTERPRETED,
        reason="no CUDA device; tests/test_interpreter.py runs it in Triton's interpreter",
    ),
]


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("way", ["whole chains", "one by one", "exact", "vae", "completion"])
def test_twenty_updates(tmp_path, monkeypatch, way):
    launches = count_launches(monkeypatch)
    if way == "one by one":
        monkeypatch.setattr(trajectory, "supports", lambda *a, **k: False)
    common = dict(iterations=20, steps=6, chains=8, batch_size=8, threshold=1.0, log_every=1, sample_every=0)
    common |= dict(sampler="anila-mh", step_size=0.02) if way == "exact" else dict(sampler="anila", step_size=0.005)
    if way == "vae":
        common |= dict(init="vae", vae_width=8, vae_warm_up=2)
    elif way == "completion":  # chains that move by the step's mask, which is part of the same launch
        common |= dict(task="completion", data="digits", width=4, vae_width=4, steps=3, threshold=0.005)
    for fused in (True, False):
        lines = []
        train(Settings(**common, fused=fused, out=str(tmp_path / str(fused))), say=lines.append)
        expected = (
            {"whole chains": 20, "one by one": 120, "exact": 140, "vae": 20, "completion": 60}[way] if fused else 0
        )
        if torch.cuda.is_available():  # the first updates, and the capture
            expected = expected // 20 * (updates._WARM_UP + 1)
        assert len(launches) == expected
        assert ("whole-chain Triton kernel" in lines[0]) == (fused and way in ("whole chains", "vae"))
        launches.clear()
    fused, plain = rows(tmp_path / "True"), rows(tmp_path / "False")
    assert len(fused) == len(plain) == 20
    assert any(row["clip_fraction"] > 0.05 for row in plain)
    for a, b in zip(fused, plain, strict=True):
        for key in a.keys() - {"seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-3), (a["iteration"], key)


def count_launches(monkeypatch) -> list[str]:
    """The names of the launch functions that are called from now on."""
    seen = []

    def counted(module, name):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (seen.append(name), launch(*a, **k)))

    counted(ops._kernel, "launch")
    counted(metropolis._kernel, "launch")
    counted(ops._rows, "launch")
    counted(trajectory._mlp, "launch_mlp")
    return seen
