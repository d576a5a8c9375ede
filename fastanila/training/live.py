"""What weighted walkers and their witnesses say of a model while it learns: its normalising constant and likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import noise
from ..data import densities
from ..data.images import Images, from_pixels
from ..models.score import sampling
from ..noise import Stream
from ..samplers import weighted
from . import build
from .job import Job

#: Held-out data that the likelihood is of, at most: of a density so many draws.
_HELD_OUT = 4096


@torch.no_grad()
def live(job: Job) -> dict[str, float]:
    """Of a run with init="weighted", as its last update left it; nothing of others.

    ess: effective sample size of the walkers, as a share of them. With witnesses, which measure the rest:
    ess_witnesses: theirs. log_z, log_z_error: log Z of the parameters as they are, and its standard error. nll_live:
    mean U of held-out data, the same ones every time, plus log Z: nats. nll_average: the same of the moving average,
    which evaluation and sampling use; its log Z is that of weights A + U(z) - U_average(z).
    """
    if job.settings.init != "weighted":
        return {}
    start = job.start
    row = {"ess": weighted.ess(start.walker_log_weights).item()}
    log_weights = start.witness_log_weights
    if not len(log_weights):
        return row
    data, witnesses = held_out(job), start.states[start.count :]
    log_z = weighted.log_z(log_weights)
    on_data, on_witnesses = _energies(job, job.ebm.module, data, witnesses)
    row |= {
        "ess_witnesses": weighted.ess(log_weights).item(),
        "log_z": log_z.value.item(),
        "log_z_error": log_z.error.item(),
        "nll_live": (on_data.mean() + log_z.value).item(),
    }
    if job.ebm.average is not None:
        of_data, of_witnesses = _energies(job, job.ebm.average, data, witnesses)
        moved = weighted.log_z(log_weights + on_witnesses - of_witnesses)
        row["nll_average"] = (of_data.mean() + moved.value).item()
    return row


def held_out(job: Job) -> Tensor:
    """Held-out data (N, ...), float32 on the job's device, with the noise that data get; always the same."""
    data, how = job.data, dict(seed=job.settings.seed, device=job.device)
    if isinstance(data, densities.Density) or len(data.held_out) > _HELD_OUT:
        x = data.draw(_HELD_OUT, step=0, purpose="held-out", **how)
    else:
        x = (from_pixels(data.held_out) if isinstance(data, Images) else data.held_out).to(job.device)
    normals = noise.normal(x.shape, step=noise.MAX_STEP - 1, stream=Stream.DATA_NOISE, **how)  # of no update
    return x + job.settings.data_noise * normals


def _energies(job: Job, network: torch.nn.Module, *states: Tensor) -> list[Tensor]:
    energy = build.at_precision(network, job.settings.precision)
    with sampling(energy):
        return [energy(x).double() for x in states]
