"""The table's works under pytest-benchmark: `pytest bench --benchmark-only`. A group is one work done in several ways.

For ratios take `python -m bench.table`, which times the ways of a work in turn; here they run one after the other.
"""

import contextlib
import re

import pytest
import torch

from bench import rows
from bench.rivals import NotInstalled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cases():
    found = []
    for row in rows.rows(DEVICE.type):
        if not row.once:
            with contextlib.ExitStack() as closing:
                ways = row.build(DEVICE, closing)
            found += [pytest.param(row, way, id=re.sub(r"\W+", "-", f"{row.work} {way}")) for way in ways]
    return found


@pytest.mark.parametrize(("row", "way"), cases())
def test_way(benchmark, row, way):
    benchmark.group, benchmark.name = row.work, way
    with contextlib.ExitStack() as closing:
        try:
            function = row.build(DEVICE, closing)[way]()
        except NotInstalled as missing:
            pytest.skip(str(missing))

        def run():
            function()
            if DEVICE.type == "cuda" and not row.host:
                torch.cuda.synchronize()

        benchmark.extra_info.update(shape=row.shape, dtype=row.dtype, device=DEVICE.type)
        benchmark.pedantic(run, rounds=7, warmup_rounds=2)
