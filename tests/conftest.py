import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # ahead of torch: workers that all take all cores wait for one another
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import pytest
import torch

from fastanila.samplers import kept

# A suite that is started in the background ignores these, and so would the commands that its tests end by them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Compiled functions of one test do not count against another's limits."""
    torch._dynamo.reset()
    yield


@pytest.fixture
def poisoned(monkeypatch):
    """Buffers that come uninitialised are full of NaN, so that an element nobody wrote shows."""
    empty_like = torch.empty_like

    def filled(*args, **kwargs):
        out = empty_like(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty_like", filled)


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile traces as ever and then runs what it traced: the graphs, without waiting for a compiler."""
    made = []

    def traced(graph, inputs):
        made.append(graph)
        return graph

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: traced)
    monkeypatch.setattr(kept, "energies", type(kept.energies)())
    return made


@pytest.fixture(params=["traced", pytest.param("compiled", marks=pytest.mark.slow)])
def compiler(request):
    """For tests of what is traced, and when: the graphs run as they are, and in the slow tests are compiled too."""
    if request.param == "traced":
        request.getfixturevalue("graphs")


def pytest_collection_modifyitems(items):
    """The longest first: what begins last keeps one worker waiting for the other."""
    items.sort(key=lambda item: item.path.name not in ("test_interpreter.py", "test_capture_rules.py"))


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """Features and classifiers are kept for this session alone, and not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTANILA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
