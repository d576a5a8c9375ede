"""One update of the default rings job (60 transitions of 512 chains, loss, backward, Adam), fused and not."""

import pytest
import torch

from fastanila import ops, train
from fastanila.config import Settings


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_rings_update(benchmark, fused):
    job = train.prepare(Settings(fused=fused))
    update = train.build_update(job)
    benchmark.group = f"one rings update, {job.device.type}"
    benchmark.name = "fused" if fused else "not fused"
    made = iter(range(1_000_000))

    def run():
        if fused:
            update(next(made))
        else:
            with ops.plain():
                update(next(made))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, warmup_rounds=3)
