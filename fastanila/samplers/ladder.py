"""The temperatures of replicas, and which of them trade places: pure functions, for `tempering`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import checks


def geometric(replicas: int, highest: float) -> tuple[float, ...]:
    """Temperatures from 1 to ``highest``, each the same multiple of the one before: a start for `adapt`."""
    checks.count("replicas", replicas, least=2)
    checks.positive("highest", highest, finite=True)
    if highest <= 1:
        raise ValueError(f"highest must be above 1, the temperature of the cold chains, got {highest}")
    return tuple(highest ** (r / (replicas - 1)) for r in range(replicas))


def exchanged(energies: Tensor, betas: Tensor, uniform: Tensor, step: int | Tensor) -> Tensor:
    """Where each state of a deterministic even-odd exchange comes from: (R, B) int64, the replica it was in before.

    energies: U (R, B); not finite: no exchange. betas: (R,), 1 / temperature. uniform: (R, B), of which a pair takes
    that of its colder state. At even steps replicas 0 and 1, 2 and 3, ... are pairs, at odd ones 1 and 2, 3 and 4, ...
    """
    r = torch.arange(len(betas), device=betas.device)
    partner = torch.where((r + step) % 2 == 0, r + 1, r - 1)
    partner = torch.where((partner < 0) | (partner >= len(betas)), r, partner)
    log_ratio = (betas - betas[partner])[:, None] * (energies - energies[partner])
    accepted = uniform[torch.minimum(r, partner)].log() < log_ratio  # False where it is not a number
    accepted = accepted & energies.isfinite() & energies[partner].isfinite()
    return torch.where(accepted, partner[:, None], r[:, None])


def equalised(temperatures: Sequence[float], rejections: Sequence[float]) -> tuple[float, ...]:
    """As many temperatures from the first to the last, between which exchanges would be refused equally often.

    rejections: (R - 1,), how often those of neighbours are refused at the ``temperatures`` (R,). Their running sum is
    the communication barrier of Syed et al. (2022, section 5), which the new temperatures part equally; between the old
    ones it is taken as linear in the logarithm of the temperature.
    """
    barrier = np.concatenate([[0.0], np.cumsum(np.maximum(rejections, 1e-3))])
    logs = np.interp(np.linspace(0, barrier[-1], len(barrier)), barrier, np.log(temperatures))
    return (1.0, *np.exp(logs[1:-1]).tolist(), float(temperatures[-1]))


def between(x: Tensor, temperatures: Sequence[float], placed: Sequence[float]) -> Tensor:
    """Numbers of each temperature (R,) as those of others, linear in the logarithm."""
    values = np.interp(np.log(placed), np.log(temperatures), x.tolist())
    return torch.as_tensor(values, dtype=x.dtype, device=x.device)
