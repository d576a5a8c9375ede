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

    ess: effective sample size of the walkers, as a share of them. With witnesses, which measure the rest of the moving
    average, the model that evaluation and sampling use: ess_witnesses: theirs. log_z, log_z_error: log Z and its
    standard error. nll_live: mean U of held-out data, the same ones every time, plus log Z: nats.
    """
    if job.settings.init != "weighted":
        return {}
    row = {"ess": weighted.ess(job.start.walkers.log_weights).item()}
    log_weights = job.start.witnesses.log_weights
    if len(log_weights):
        log_z, energy = weighted.log_z(log_weights), build.at_precision(job.ebm.average, job.settings.precision)
        with sampling(energy):
            on_data = energy(held_out(job)).double().mean()
        row |= {
            "ess_witnesses": weighted.ess(log_weights).item(),
            "log_z": log_z.value.item(),
            "log_z_error": log_z.error.item(),
            "nll_live": (on_data + log_z.value).item(),
        }
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
