"""The Metropolis transition as an operator: accept or reject the last proposal and make the next.

``torch.ops.fastanila.metropolis_step`` is one Triton kernel on CUDA tensors; where none runs, and for torch.compile on
a CPU, it is the plain definition, `fastanila.ops.reference.metropolis_step`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import noise
from . import dispatch, reference
from .arguments import (
    as_seed,
    as_step,
    as_step_size,
    as_threshold,
    check_alike,
    check_chains,
    check_device,
    check_mask,
    check_norm,
    check_offset,
    check_tensor,
)
from .reference import Metropolis
from .schemas import MetropolisArguments


def metropolis_step(
    z: Tensor,
    score: Tensor,
    energy: Tensor,
    proposal: Tensor,
    proposal_score: Tensor,
    proposal_energy: Tensor,
    threshold: float | Tensor,
    *,
    step_size: float | Tensor = 1.0,
    norm: str = "element",
    seed: int | Tensor,
    step: int | Tensor,
    offset: int = 0,
    mask: Tensor | None = None,
) -> Metropolis:
    """Accept or reject ``proposal``, and make the next (Metropolis et al. 1953, Hastings 1970), for each chain.

        log alpha = U(z) - U(z') + log q(z | z') - log q(z' | z);   z moves to z' where log u < log alpha

    with q the anisotropic step at noise scale 1, whose law is `reference.proposal`; with b = inf it is MALA (Roberts
    and Tweedie 1996). The score at the proposal makes the next one, so that a transition takes one gradient:

        proposal = anisotropic_step(z, score, b, step_size=eps, norm=norm, seed=seed, step=t, mask=mask)    # the first
        for t in t, t + 1, ...:
            z, score, energy, proposal, acceptance = metropolis_step(
                z, score, energy, proposal, score_of(proposal), energy_of(proposal), b,
                step_size=eps, norm=norm, seed=seed, step=t, mask=mask)

    Args:
        z: chains, (B, ...), float32, bfloat16 or float16, any memory layout.
        score: gradient of the log density -U at z, of the same shape, dtype and device.
        energy: U at z, (B,) float32.
        proposal: where the chains may move, of z's shape, dtype and device.
        proposal_score: as ``score``, at the proposal.
        proposal_energy: as ``energy``, at the proposal.
        threshold: b > 0, or inf, as in `anisotropic_step`.
        step_size: eps > 0, as there.
        norm: what |s| is, as there.
        seed: names the randomness with ``step`` (see `fastanila.noise`), and is taken mod 2^64.
        step: 0 <= step < 2^56 - 1. The proposal was made with the normals of ``step``, is judged by its acceptance
            uniform, and the next is made with the normals of ``step + 1``.
        offset: the global index of the first chain.
        mask: bool, broadcastable to z. Where it is False the proposal is to equal z, as the next does; such elements
            have no part in the ratio, but their scores count in a norm that they share.

    threshold, step_size (any float dtype), seed and step (int64) may each be a 0-dim tensor on z's device, which may
    change without recompilation. Values inside tensors are not checked.

    Returns:
        `reference.Metropolis` (z, score, energy, proposal, acceptance): contiguous, new and detached. The ratio is
        that of the states as they are stored, in float32 arithmetic. Where log alpha is not finite, as with a NaN or
        infinite score or energy, the chain stays and its acceptance is 0.

    Law: exp(-U), exactly, up to the storage's rounding of proposals.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what was expected.
    """
    tensors, arguments = prepare(
        z, score, energy, proposal, proposal_score, proposal_energy, threshold, step_size, norm, seed, step, offset,
        mask,
    )  # fmt: skip
    if not dispatch.fused(z, norm):
        return Metropolis(*_plain(*tensors, arguments))  # not the operator, so that Inductor fuses it
    past_dispatcher = dispatch.direct(*tensors)
    # ahead of the operator, where a compiler fuses the conversion of a channels_last score with what made it
    tensors = [t.contiguous() for t in tensors]
    return Metropolis(*(_kernel(*tensors, arguments) if past_dispatcher else _OPERATOR(*tensors, *arguments)))


def prepare(
    z, score, energy, proposal, proposal_score, proposal_energy, threshold, step_size, norm, seed, step, offset, mask
) -> tuple[tuple[Tensor, ...], MetropolisArguments]:
    """(the six tensors, the rest) as the operator takes them: every argument checked, tensors detached."""
    check_chains(z)
    states = dict(score=score, proposal=proposal, proposal_score=proposal_score)
    for name, value in states.items():
        check_alike(name, value, z)
    for name, value in dict(energy=energy, proposal_energy=proposal_energy).items():
        check_tensor(name, value)
        if value.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {value.dtype}")
        if value.shape != z.shape[:1]:
            raise ValueError(f"{name} must have shape {tuple(z.shape[:1])}, one a chain, got {tuple(value.shape)}")
        check_device(name, value, z)
    check_norm(norm, z)
    check_mask(mask, z)
    check_offset(offset)
    tensors = (z, score, energy, proposal, proposal_score, proposal_energy)
    return tuple(t.detach() for t in tensors), MetropolisArguments(
        *as_threshold(threshold, z), *as_step_size(step_size, z), norm,
        *as_seed(seed, z), *as_step(step, z, steps=2), offset, mask,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- implementations


def _plain(z, score, energy, proposal, proposal_score, proposal_energy, arguments: MetropolisArguments) -> tuple:
    numbers = arguments.numbers()
    step = numbers.pop("step")
    place = dict(seed=numbers.pop("seed"), offset=arguments.offset, device=z.device)
    made = reference.metropolis_step(
        z,
        score,
        energy,
        proposal,
        proposal_score,
        proposal_energy,
        norm=arguments.norm,
        mask=arguments.mask,
        uniform=noise.uniform(energy.shape, step=step, stream=noise.Stream.ACCEPTANCE, **place),
        noise=noise.normal(z.shape, step=step + 1, stream=noise.Stream.LANGEVIN, **place),
        **numbers,
    )
    return tuple(t.contiguous() for t in made)


def _kernel(z, score, energy, proposal, proposal_score, proposal_energy, arguments: MetropolisArguments) -> tuple:
    tensors = (z, score, energy, proposal, proposal_score, proposal_energy)
    rows = dispatch.kernels.step_rows
    norm, mask = arguments.norm, arguments.mask
    if z.numel() == 0 or not rows.fits(z.shape, norm):
        return _plain(*tensors, arguments)
    out = _outputs(z, energy)
    with dispatch.launching_on(z.device):
        dispatch.kernels.metropolis.launch(
            *(dispatch.aligned(t.contiguous()) for t in tensors),
            out,
            chains=len(z),
            **rows.view(z.shape, norm)._asdict(),
            mask=None if mask is None else dispatch.aligned(mask.expand_as(z).contiguous()),
            offset=arguments.offset,
            fast=z.is_cuda and torch.version.hip is None,
            **arguments.numbers(),
        )
    return tuple(out)


def _outputs(z: Tensor, energy: Tensor) -> Metropolis:
    state, one_a_chain = (
        [torch.empty_like(like, memory_format=torch.contiguous_format) for _ in range(count)]
        for like, count in ((z, 3), (energy, 2))
    )
    return Metropolis(state[0], state[1], one_a_chain[0], state[2], one_a_chain[1])


_OPERATOR = dispatch.register(
    "metropolis_step",
    tuple(f"Tensor {name}" for name in ("z", "score", "energy", "proposal", "proposal_score", "proposal_energy")),
    MetropolisArguments,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_kernel,
    plain=_plain,
    fake=lambda z, score, energy, *rest: tuple(_outputs(z, energy)),
)
