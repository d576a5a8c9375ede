"""What each operator means, in plain PyTorch: the definition that every kernel is tested against.

Arithmetic is float32 for float32, bfloat16 and float16 storage, and float64 for float64, which is the oracle.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NORMS = ("element", "channel", "chain")
#: When the gain is taken: from every transition's score, or once, where a chain starts.
REFRESHES = ("transition", "update")


class Statistics(NamedTuple):
    """What one transition did to each chain: (B,) each, of the arithmetic's dtype."""

    gamma_mean: Tensor  #: mean gain of the chain's elements, in [0, 1]
    score_rms: Tensor  #: root mean square of the score's elements, 1 / unit of z
    clip_fraction: Tensor  #: fraction of elements whose gain is below 1, which is |s| > b


def anisotropic_step(
    z: Tensor,
    score: Tensor,
    threshold: float | Tensor | None,
    *,
    step_size: float | Tensor = 1.0,
    noise_scale: float | Tensor = 1.0,
    norm: str = "element",
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    noise: Tensor,
) -> Tensor:
    """One anisotropic Langevin transition with its noise given.

        gamma = 1 / max(1, |s| / b)
        z'    = z + eps/2 * gamma * s + sigma * sqrt(eps * gamma) * noise

    with s = score, b = threshold, eps = step_size, sigma = noise_scale (Karimi, Xie and Li, STANLEY, Algorithm 1,
    to which eps = sigma = 1 reduces). For what the arguments are, see `fastanila.ops.anisotropic_step`; ``noise`` has
    the shape of z.
    """
    x, s = _wide(z), _wide(score)
    if gamma is not None:
        g = gamma.to(x.dtype)
        drift = g * s
    else:
        g, drift = clipped(s, threshold, norm)
    eps, sigma = _tensor(step_size, x), _tensor(noise_scale, x)
    moved = x + 0.5 * eps * drift + sigma * torch.sqrt(eps * g) * noise.to(x.dtype)
    if bounds is not None:
        moved = torch.clamp(moved, *bounds)
    if mask is not None:
        moved = torch.where(mask, moved, x)
    return moved.to(z.dtype)


class Proposal(NamedTuple):
    """What a transition draws from ahead of any correction: independent normals, by element of the state.

    float32, for a float64 state float64, as all arithmetic here.
    """

    mean: Tensor  #: of z's shape
    sd: Tensor  #: of z's shape; 0 is a point mass


def proposal(
    z: Tensor,
    score: Tensor,
    threshold: float | Tensor,
    *,
    step_size: float | Tensor = 1.0,
    noise_scale: float | Tensor = 1.0,
    norm: str = "element",
) -> Proposal:
    """The law of `anisotropic_step` at z: mean z + eps/2 gamma s, standard deviation sigma sqrt(eps gamma)."""
    displacement, sd = _move(_wide(score), threshold, step_size, norm)
    return Proposal(_wide(z) + displacement, _tensor(noise_scale, sd) * sd)


def log_q(y: Tensor, given: Proposal, mask: Tensor | None = None) -> Tensor:
    """log q(y | x) in nats, (B,), where ``given`` is the proposal at x: the sum over a chain's elements of the log
    density of N(mean_i, sd_i^2). With ``mask`` it is over the elements that move."""
    x = _wide(y)
    terms = -0.5 * ((x - given.mean) / given.sd).square() - given.sd.log() - 0.5 * math.log(2 * math.pi)
    return chain_sum(terms, mask)


def log_accept(
    z: Tensor,
    score: Tensor,
    energy: Tensor,
    proposal_: Tensor,
    proposal_score: Tensor,
    proposal_energy: Tensor,
    threshold: float | Tensor,
    *,
    step_size: float | Tensor,
    norm: str = "element",
    mask: Tensor | None = None,
) -> Tensor:
    """The log of the Metropolis-Hastings ratio of moving from z to ``proposal_``, (B,), not cut at 0:

        log alpha = U(z) - U(z') + log q(z | z') - log q(z' | z)

    (Metropolis et al. 1953, Hastings 1970), q as in `log_q`, but with the two densities' difference summed element by
    element: each sum is of the order of the chain's size, and their difference of order one.
    """
    moved = _wide(proposal_) - _wide(z)  # exact for neighbours, where a rounded mean of either would cost digits
    displacement, sd = _move(_wide(score), threshold, step_size, norm)
    displacement_back, sd_back = _move(_wide(proposal_score), threshold, step_size, norm)
    forth, back = (moved - displacement) / sd, (-moved - displacement_back) / sd_back
    terms = 0.5 * (forth - back) * (forth + back) + (sd / sd_back).log()
    return (energy - proposal_energy).to(terms.dtype) + chain_sum(terms, mask)


class Judgement(NamedTuple):
    accepted: Tensor  #: (B,) bool
    acceptance: Tensor  #: (B,), min(1, alpha)

    def pick(self, new: Tensor, old: Tensor) -> Tensor:
        """The new (B, ...) where a chain's proposal was accepted, else the old."""
        return torch.where(self.accepted.reshape(-1, *[1] * (old.dim() - 1)), new, old)


def acceptance(log_alpha: Tensor) -> Tensor:
    """min(1, alpha), of any shape; 0 where log alpha is not finite."""
    return torch.where(torch.isfinite(log_alpha), log_alpha.clamp(max=0.0).exp(), 0.0)


def judge(log_alpha: Tensor, uniform: Tensor) -> Judgement:
    """Accept with probability min(1, alpha), by a uniform on (0, 1]: both (B,). Not finite rejects."""
    accepted = torch.isfinite(log_alpha) & (uniform.to(log_alpha.dtype).log() < log_alpha)
    return Judgement(accepted, acceptance(log_alpha))


class Metropolis(NamedTuple):
    """A Metropolis transition: the state it leaves, the next proposal, and how likely the last was to be accepted."""

    z: Tensor  #: (B, ...)
    score: Tensor  #: (B, ...), at z
    energy: Tensor  #: (B,), at z
    proposal: Tensor  #: (B, ...), for the next transition
    acceptance: Tensor  #: (B,), min(1, alpha) of the proposal that was judged


def metropolis_step(
    z: Tensor,
    score: Tensor,
    energy: Tensor,
    proposal_: Tensor,
    proposal_score: Tensor,
    proposal_energy: Tensor,
    threshold: float | Tensor,
    *,
    step_size: float | Tensor,
    norm: str = "element",
    mask: Tensor | None = None,
    uniform: Tensor,
    noise: Tensor,
) -> Metropolis:
    """Accept or reject a proposal, and make the next, with the randomness given.

    ``uniform`` (B,) on (0, 1] decides: a chain moves where log u < log alpha (`log_accept`), and stays where log alpha
    is not finite. ``noise``, of z's shape, makes the next proposal: `anisotropic_step` from where the chain then is.
    """
    log_alpha = log_accept(
        z, score, energy, proposal_, proposal_score, proposal_energy, threshold, step_size=step_size, norm=norm,
        mask=mask,
    )  # fmt: skip
    judged = judge(log_alpha, uniform)
    z, score = judged.pick(proposal_, z), judged.pick(proposal_score, score)
    return Metropolis(
        z,
        score,
        judged.pick(proposal_energy, energy),
        anisotropic_step(z, score, threshold, step_size=step_size, norm=norm, mask=mask, noise=noise),
        judged.acceptance,
    )


def clipped(score: Tensor, threshold: float | Tensor, norm: str = "element") -> tuple[Tensor, Tensor]:
    """(gamma, gamma * score), gamma in [0, 1] of a shape that broadcasts to the score's.

    ``norm`` says what |s| is: of each element, of each pixel's channels (dim 1), or of the whole chain (all but dim 0).
    However large the score, the product is of size b and finite; a NaN stays one, for all that share its norm.
    """
    b = _tensor(threshold, score)
    # |s| / b compared with 1, because that needs no special case for b = inf, where gamma = 1.
    if not _dims(score, norm):
        return 1.0 / torch.clamp(score.abs() / b, min=1.0), torch.clamp(score, -b, b)
    unit, scale = _scaled(score, _dims(score, norm))
    length = unit.square().sum(_dims(score, norm), keepdim=True).sqrt()
    ratio = scale / b * length
    return 1.0 / torch.clamp(ratio, min=1.0), torch.where(ratio <= 1.0, score, b * (unit / length))


def gain(score: Tensor, threshold: float | Tensor, norm: str = "element") -> Tensor:
    """gamma of every element, of the score's shape, to be frozen: the ``gamma`` of later steps. At least float32."""
    return clipped(_wide(score), threshold, norm)[0].expand_as(score)


def statistics(
    score: Tensor, threshold: float | Tensor | None, norm: str = "element", gamma: Tensor | None = None
) -> Statistics:
    """`Statistics` of a step with this score (B, ...) and threshold, or with the frozen gain ``gamma``.

    However large the score, its root mean square does not overflow. Chains without elements have gain 1 and score 0.
    """
    s = _wide(score)
    chains = s.shape[0]
    if s.numel() == 0:
        return Statistics(s.new_ones(chains), s.new_zeros(chains), s.new_zeros(chains))
    if gamma is None:
        g = clipped(s, threshold, norm)[0].reshape(chains, -1)
    else:
        g = gamma.to(s.dtype).expand_as(s).reshape(chains, -1)
    flat = s.reshape(chains, -1)
    largest = flat.abs().amax(1)
    scale = torch.where((largest > 0) & (largest < math.inf), largest, 1.0)
    rms = scale * (flat / scale[:, None]).square().mean(1).sqrt()
    return Statistics(g.mean(1), rms, (g < 1).to(s.dtype).mean(1))


def magnitude(score: Tensor, norm: str) -> Tensor:
    """|s| by element, channel or chain, of a shape that broadcasts to the score's."""
    if not _dims(score, norm):
        return score.abs()
    unit, scale = _scaled(score, _dims(score, norm))
    return scale * unit.square().sum(_dims(score, norm), keepdim=True).sqrt()


def _move(score: Tensor, threshold, step_size, norm: str) -> tuple[Tensor, Tensor]:
    """(eps/2 gamma s, sqrt(eps gamma)): where a step of scale 1 leads on average, and how wide it spreads."""
    gamma, drift = clipped(score, threshold, norm)
    eps = _tensor(step_size, score)
    return 0.5 * eps * drift, torch.sqrt(eps * gamma).expand_as(score)


def chain_sum(terms: Tensor, mask: Tensor | None = None) -> Tensor:
    """The sum of each chain's terms, (B, ...) to (B,); with ``mask``, of those that it lets move."""
    if mask is not None:
        terms = torch.where(mask, terms, 0.0)
    return terms.flatten(1).sum(1) if terms.dim() > 1 else terms


def _dims(score: Tensor, norm: str) -> tuple[int, ...]:
    """The dimensions over which the norm runs; none where each element stands for itself, or there is none."""
    if score.numel() == 0:
        return ()
    return {"element": (), "channel": (1,), "chain": tuple(range(1, score.dim()))}[norm]


def _scaled(score: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(unit, scale) with score = scale * unit and unit's largest element 1, so that no square overflows.

    Infinite elements are taken for equally large ones beside which the finite ones vanish.
    """
    largest = score.abs().amax(dims, keepdim=True)
    infinite = largest == math.inf
    scale = torch.where((largest > 0) & ~infinite, largest, 1.0)
    unit = torch.where(infinite, torch.where(score.isinf(), score.sign(), 0.0), score / scale)
    return unit, torch.where(infinite, largest, scale)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _tensor(value: float | Tensor, like: Tensor) -> Tensor:
    # once, ahead of the arithmetic: torch 2.11 miscompiles it for a Python float that changes between calls
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)
