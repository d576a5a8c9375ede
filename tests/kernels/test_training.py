"""Training through the kernel gives the numbers of the plain definition: on CUDA, or in Triton's interpreter."""

import pytest
import torch

from cases import with_slow
from fastanila import ops
from fastanila.ops import dispatch
from fastanila.samplers import whole_chain
from fastanila.training import update
from fastanila.training.loop import train
from fastanila.training.settings import Settings
from run_files import rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not ops.INTERPRETED,
        reason="no CUDA device; tests/test_interpreter.py runs it in Triton's interpreter",
    ),
]


# in the interpreter the compiler takes minutes, and has no part in the kernels; updates take seconds
WAYS = ["compiled"] if torch.cuda.is_available() else ["traced", pytest.param("compiled", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True, params=WAYS)
def updates(request):
    """How many are made: enough for differences to grow, or few where nothing is compiled."""
    if request.param == "traced":
        request.getfixturevalue("graphs")
    return 4 if request.param == "traced" else 20


SMALL = dict(sampler="anila", step_size=0.005, steps=6, chains=8, batch_size=8, threshold=1.0)


@pytest.mark.parametrize("way", with_slow(["exact, one by one"], ["whole chains", "one by one", "exact"]))
def test_the_updates(tmp_path, monkeypatch, way, updates):
    """The default job's sampler is the exact one."""
    if "one by one" in way:
        monkeypatch.setattr(whole_chain, "supports", lambda *a, **k: False)
    changes = dict(sampler="anila-mh", step_size=0.02) if "exact" in way else {}
    launches = {"one by one": 6, "exact, one by one": 7}.get(way, 1)
    seen = compare(tmp_path, monkeypatch, launches, launches == 1, **SMALL | changes, iterations=updates)
    assert any(row["clip_fraction"] > 0.05 for row in seen)


# slow: in the interpreter it takes minutes to compile; on a GPU `-m gpu` runs both
@pytest.mark.parametrize("task", [pytest.param(task, marks=pytest.mark.slow) for task in ("generation", "completion")])
def test_updates_with_a_vae(tmp_path, monkeypatch, task):
    """Chains of completions move by the step's mask, which is part of the same launch."""
    if task == "generation":
        seen = compare(tmp_path, monkeypatch, 1, True, **SMALL, init="vae", vae_width=8, vae_warm_up=2, iterations=6)
    else:
        images = dict(data="digits", width=2, vae_width=2, latent=2, threshold=0.005, steps=2, chains=2, batch_size=2)
        seen = compare(tmp_path, monkeypatch, 2, False, **SMALL | images, task=task, mask="blocks", iterations=4)
    assert all(row["kl"] > 0 and row["moved"] > 0 for row in seen)


def compare(tmp_path, monkeypatch, launches, whole, **settings):
    """Train through the kernels, that many launches an update, and by the plain definition: the same numbers."""
    seen = count_launches(monkeypatch)
    for fused in (True, False):
        lines = []
        train(
            Settings(**settings, fused=fused, log_every=1, sample_every=0, out=str(tmp_path / str(fused))),
            say=lines.append,
        )
        updates_run = update.WARM_UP + 1 if torch.cuda.is_available() else settings["iterations"]  # and the capture
        assert len(seen) == (launches * updates_run if fused else 0)
        assert ("whole-chain Triton kernel" in lines[0]) == (fused and whole)
        seen.clear()
    fused, plain = rows(tmp_path / "True"), rows(tmp_path / "False")
    assert len(fused) == len(plain) == settings["iterations"]
    for a, b in zip(fused, plain, strict=True):
        for key in a.keys() - {"seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-3), (a["iteration"], key)
    return plain


def count_launches(monkeypatch) -> list[str]:
    """The names of the launch functions that are called from now on."""
    seen = []

    def counted(module, name):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (seen.append(name), launch(*a, **k)))

    counted(dispatch.kernels.step, "launch")
    counted(dispatch.kernels.metropolis, "launch")
    counted(dispatch.kernels.step_rows, "launch")
    counted(dispatch.kernels.mlp, "launch_mlp")
    return seen
