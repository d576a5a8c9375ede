"""The first minutes on a GPU: does every work of the table run by its path, is a capture that fails cleared away, does
the default job learn? (That the numbers are right, the tests marked gpu say.)

`python -m bench.smoke PART ...` prints one JSON object a line for every finding, and tracebacks on stderr. Every check
stands alone: one that breaks is a finding too, and the next goes on. Its exit code is 1 if a finding is not ok.
`bench.gpu` runs every part in a process of its own, side by side, which fills the compilers' caches for the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch

from fastanila import evaluate
from fastanila.graphs import cuda_graph
from fastanila.training import loop
from fastanila.training.settings import Settings

from . import rows, table
from .row import GROUPS, OURS
from .timing import fallbacks_are_errors

Finding = dict[str, object]
Check = Callable[[torch.device], Iterator[Finding]]


def failed_capture(device: torch.device) -> Iterator[Finding]:
    """One that fails leaves torch whole: its generator, its memory and the next capture."""
    x = torch.ones(8, device=device)
    torch.randn(2, device=device)
    try:
        cuda_graph(lambda: x.sum().item(), device)
        refused = None
    except RuntimeError as error:
        refused = str(error).splitlines()[0]
    torch.randn(2, device=device)
    before = torch.cuda.memory_reserved(device)
    large = torch.empty(1 << 28, device=device)
    del large
    torch.cuda.empty_cache()
    replay = cuda_graph(lambda: x * 2, device)
    twice = replay().tolist()
    kept = torch.cuda.memory_reserved(device) - before
    ok = refused is not None and twice == [2.0] * 8 and kept < 1 << 28
    yield dict(check="a capture that fails", ok=ok, error=refused, kept_MB=kept >> 20)


def works(group: str) -> Check:
    """Our ways of the group's rows: each runs, by the path that its row is named for."""

    def check(device: torch.device) -> Iterator[Finding]:
        for row in rows.rows(device.type):
            if row.group == group:
                with contextlib.ExitStack() as closing:
                    _, notes = table.built({OURS: row.build(device, closing)[OURS]}, device)
                yield dict(check=row.work, ok=not notes, error=notes.get(OURS))

    return check


def trains(device: torch.device) -> Iterator[Finding]:
    """The default job, shortened: it learns the rings."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(iterations=1000, sample_every=0, out=f"{folder}/run", device=str(device))
        found = evaluate.evaluate(loop.train(settings, say=lambda text: None))
    ok = math.isfinite(found["gap"]) and found["tv"] < 0.5
    yield dict(check="training", ok=ok, updates=settings.iterations, gap=found["gap"], tv=found["tv"])


#: The checks, whose names the command line takes.
PARTS: dict[str, Check] = {
    "capture": failed_capture,
    **{group: works(group) for group in GROUPS if group != "startup"},
    "train": trains,
}


def findings(part: str, device: torch.device) -> Iterator[Finding]:
    """A part's findings, and how long it took; or how it failed, with a traceback on stderr."""
    began = time.perf_counter()
    found: Finding = {}
    try:
        with fallbacks_are_errors():
            yield from PARTS[part](device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except Exception as error:
        print(f"--- {part}", traceback.format_exc(), sep="\n", file=sys.stderr, flush=True)
        found = dict(ok=False, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    yield dict(check=part, **found, seconds=time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    arguments = made.parse_args(argv)
    good = True
    for part in arguments.parts:
        for finding in findings(part, torch.device(arguments.device)):
            good &= finding.get("ok") is not False
            print(json.dumps(finding), flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
