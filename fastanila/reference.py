"""What each operator means, in plain PyTorch: the definition that every kernel is tested against.

Arithmetic is float32 for float32, bfloat16 and float16 storage, and float64 for float64, which is the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = ("element", "channel", "chain")


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
    the shape of z. The score's infinities move an element by eps * b / 2, its NaNs stay.
    """
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    x, s = z.to(wide), score.to(wide)
    if gamma is not None:
        gain = gamma.to(wide)
        drift = gain * s
    elif norm == "element":
        gain = gain_of(s, threshold, norm)
        drift = torch.clamp(s, -_tensor(threshold, s), _tensor(threshold, s))  # gamma * s, for infinite s too
    else:
        gain = gain_of(s, threshold, norm)
        drift = gain * s
    moved = x + 0.5 * step_size * drift + noise_scale * torch.sqrt(step_size * gain) * noise.to(wide)
    if bounds is not None:
        moved = torch.clamp(moved, *bounds)
    if mask is not None:
        moved = torch.where(mask, moved, x)
    return moved.to(z.dtype)


def gain_of(score: Tensor, threshold: float | Tensor, norm: str = "element") -> Tensor:
    """gamma = 1 / max(1, |s| / b) in (0, 1], of a shape that broadcasts to the score's.

    ``norm`` says what |s| is: of each element, of each pixel's channels (dim 1), or of the whole chain (all but dim 0).
    """
    # Dividing by b and comparing with 1 needs no special case for b = inf, where gamma = 1.
    return 1.0 / torch.clamp(magnitude(score, norm) / threshold, min=1.0)


def magnitude(score: Tensor, norm: str) -> Tensor:
    """|s| by element, channel or chain; the L2 norms are scaled by the largest element, so they cannot overflow."""
    if norm == "element":
        return score.abs()
    dims = (1,) if norm == "channel" else tuple(range(1, score.dim()))
    if not dims:  # one element a chain
        return score.abs()
    largest = score.abs().amax(dims, keepdim=True)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    return scale * (score / scale).square().sum(dims, keepdim=True).sqrt()


def _tensor(value: float | Tensor, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)
