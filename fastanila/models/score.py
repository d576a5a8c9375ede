"""From an energy to (energy, score), and the state in which a model is sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import callables

Evaluate = Callable[[Tensor], tuple[Tensor | None, Tensor]]  #: z (B, ...) -> energy (B,), score (B, ...)


def evaluator(energy, score=None, *, traced: bool = False) -> Evaluate:
    """z -> (energy, score) of an energy: by autograd, or by torch.func.grad, which torch.compile can trace.

    Called under torch.inference_mode() or with a z made there, the first way differentiates all the same. Raises
    ValueError, TypeError for an energy that is not (B,), that does not depend on z, or that reads a tensor made under
    torch.inference_mode() where its gradient needs it.
    """
    if score is not None:
        return lambda z: (None, score(z))
    if energy is None:
        raise ValueError("energy must be a callable (B, ...) -> (B,) unless score is given, got None")

    # Where the score's sign costs no kernel; rounding is symmetric, so its bits are the same. Inside the function it
    # folds into the backward's first kernel. On the gradient it folds into the sum with a confinement's, which it also
    # keeps out of the product's own kernel, ahead of which that would take a copy.
    inside = not getattr(energy, "confinement", 0.0)

    def total(z: Tensor) -> tuple[Tensor, Tensor]:
        u = energy(z)
        if not isinstance(u, Tensor):
            raise TypeError(f"energy must map (B, ...) to a tensor (B,), got {type(u).__name__}")
        if u.shape != z.shape[:1]:
            raise ValueError(f"energy must map (B, ...) to (B,) = ({z.shape[0]},), got {tuple(u.shape)}")
        if not u.requires_grad:  # traced, it would have a silent score of 0
            raise ValueError("energy must be differentiable in z, but its value does not depend on z")
        return -u.sum() if inside else u.sum(), u

    def by_func(z: Tensor) -> tuple[Tensor, Tensor]:
        gradient, u = torch.func.grad(total, has_aux=True)(z)
        return u.detach(), gradient if inside else -gradient

    def by_autograd(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad(), _inference_tensors_named():
            z = outside_inference(z).detach().requires_grad_()
            whole, u = total(z)
            (gradient,) = torch.autograd.grad(whole, z, allow_unused=True)
        if gradient is None:  # only on other tensors that require a gradient
            raise ValueError("energy must be differentiable in z, but its value does not depend on z")
        return u.detach(), gradient if inside else -gradient

    return by_func if traced else by_autograd


def outside_inference(z: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made under torch.inference_mode(), of which autograd takes none."""
    return z.clone() if z.is_inference() else z


@contextlib.contextmanager
def _inference_tensors_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise ValueError(
            "energy must not read tensors made under torch.inference_mode(), through which torch takes no gradient; "
            "make them outside of it, or give it clones of them made there"
        ) from error


@contextlib.contextmanager
def sampling(energy) -> Iterator[None]:
    """A module, and those that any other callable refers to (`callables.modules`), in eval mode with frozen parameters,
    put back as they were on leaving, also by an exception; and out of torch.inference_mode() meanwhile."""
    modules = callables.modules(energy)
    parameters = {id(p): p for m in modules for p in m.parameters(recurse=False)}
    trainable = [p for p in parameters.values() if p.requires_grad and not p.is_inference()]
    training = [m for m in modules if m.training]
    try:
        for p in trainable:
            p.requires_grad_(False)
        for m in training:
            m.eval()
        with torch.inference_mode(False):
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for m in training:
            m.training = True
