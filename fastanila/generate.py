"""What a trained run makes: states of its sampler, from each of its starts; proposals of its VAE, and where the sampler
takes them; completions of images of which a region is missing.

Everything is a function of a seed, at steps past all of training, so that the same seed does not repeat its noise. The
law of states is the sampler's, see its docstring; `run.with_sampler` changes it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from . import noise
from .data import classes, completion
from .models.vae import VAE
from .noise import Stream
from .samplers import ReplicaExchange, starts
from .samplers.sampler import Sampler
from .samplers.starts import proposals
from .training import build
from .training.run import Run, box_of, updates_past, with_sampler

_DESCENDING = 256  #: states that descend at a time

STARTS = ("chains", "noise", "vae")


class Pairs(NamedTuple):
    proposals: Tensor  #: (N, ...) what the VAE proposes
    revised: Tensor  #: (N, ...) where the sampler takes each


def sample(
    run: Run,
    count: int,
    *,
    steps: int | None = None,
    start: str | None = None,
    seed: int = 0,
    fused: bool = True,
    warm_up: int = 0,
    labels: Tensor | None = None,
    replicas: int | None = None,
    highest: float | None = None,
) -> Tensor:
    """(count, ...) states of the run's sampler on its energy, on the run's device.

    ``start``: "vae" starts from what the run's VAE proposes, the default where it has one; "chains" goes on from where
    training left its chains, over again where more are wanted, each copy with noise of its own, the default elsewhere;
    "noise" starts from uniform noise. ``steps``: transitions, by default as many as an update of the run made, and ten
    times as many from noise; 0 gives the start itself. ``warm_up``: transitions ahead of them in which an exact sampler
    adapts its step size. ``fused=False`` runs the plain definition, eagerly. ``labels``: the class of each state, int64
    (count,), of a run with classes; otherwise its states are of the classes of its chains, and from noise in turn of
    every class. ``replicas``, ``highest``: that many temperatures up to the highest trade places, of which the cold
    states are returned, by default as in training; their ``warm_up`` moves the temperatures too. Raises ValueError for
    what the run has not.
    """
    if start is None:
        start = "chains" if run.vae is None else "vae"
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    if run.settings.task == "completion":
        raise ValueError("task of the run is completion, which draws no images but completes them: see `completions`")
    if labels is not None and run.classes is None:
        raise ValueError("labels can be given for a run with classes, which this one is not")
    if labels is not None:
        labels = _checked_labels(run, labels, count)
    if start == "chains":
        z = run.chains[_rows(run, count, labels)]
    elif start == "vae":
        if run.vae is None:
            raise ValueError(f"start can be vae for a run with init=vae, got a run with init={run.settings.init}")
        z = proposals(run.vae, count, seed=seed, update=updates_past(run))
    else:
        shape, box = (count, *run.chains.shape[1:]), box_of(run)
        z = starts.from_noise(shape, box, seed=seed, step=updates_past(run), device=run.chains.device)
        if run.classes is not None:
            every = torch.arange(count, device=z.device) % run.classes
            z = classes.state(classes.images(z), every if labels is None else labels)
    if steps is None:
        steps = run.settings.steps * (10 if start == "noise" else 1)
    return moved(run, z, steps=steps, seed=seed, fused=fused, warm_up=warm_up, replicas=replicas, highest=highest)


def _checked_labels(run: Run, labels: Tensor, count: int) -> Tensor:
    labels = labels.to(run.chains.device)
    if labels.shape != (count,):
        raise ValueError(f"labels must be one for each of the {count} states, got shape {tuple(labels.shape)}")
    outside = labels[(labels < 0) | (labels >= run.classes)]
    if len(outside):
        raise ValueError(f"classes must be from 0 to {run.classes - 1}, got {int(outside[0])}")
    return labels


def _rows(run: Run, count: int, labels: Tensor | None) -> Tensor:
    """Which chains to go on from: all in turn, or for each label in turn those of its class."""
    rows = torch.arange(count, device=run.chains.device)
    if labels is None:
        return rows % len(run.chains)
    of_chains = classes.labels(run.chains)
    for y in labels.unique().tolist():
        having, wanted = (of_chains == y).nonzero()[:, 0], labels == y
        if not len(having):
            raise ValueError(f"no chain of the run is of class {y}; start=noise draws of every class")
        rows[wanted] = having[torch.arange(int(wanted.sum()), device=rows.device) % len(having)]
    return rows


def moved(
    run: Run, z: Tensor, *, steps: int, seed: int = 0, fused: bool = True, warm_up: int = 0,
    mask: Tensor | None = None, replicas: int | None = None, highest: float | None = None,
) -> Tensor:  # fmt: skip
    """Where the run's sampler takes states (N, ...) in so many transitions; arguments as for `sample`. Where ``mask``
    (bool, of their shape) is False they stay; so does the class that states of a run with classes carry."""
    if warm_up and not steps:
        raise ValueError(f"warm_up must be 0 with no steps to follow, got {warm_up}")
    if warm_up and not run.sampler.is_exact:
        raise ValueError(f"warm_up adapts an exact sampler's step size, got sampler {run.settings.sampler}")
    if run.classes is not None:
        mask = classes.free(z) if mask is None else mask & classes.free(z)
    sampler = with_replicas(run, replicas, highest) if steps else run.sampler
    exchange = sampler if isinstance(sampler, ReplicaExchange) else None
    if exchange is not None:
        z = exchange.start(z)
    first = updates_past(run) * run.settings.steps
    with build.arithmetic(run.settings.precision, fused=fused):
        if warm_up:
            sampler, z = sampler.adapt(run.energy, z, steps=warm_up, seed=seed, step=first, mask=mask, compile=fused)
        z = sampler.run(
            run.energy, z, steps=steps, seed=seed, step=first + warm_up, mask=mask, compile=fused and steps > 0
        )
    return z if exchange is None else exchange.cold(z)


def with_replicas(run: Run, replicas: int | None = None, highest: float | None = None) -> Sampler:
    """The run's sampler, or as many replicas of it; by default as many as in training."""
    wanted = {k: v for k, v in (("replicas", replicas), ("highest", highest)) if v is not None}
    return build.with_replicas(run.sampler, dataclasses.replace(run.settings, **wanted))


def descended(run: Run, z: Tensor, steps: int, *, fused: bool = True) -> Tensor:
    """States (N, ...) after ``steps`` transitions without noise: gradient descent at the run's step size. It takes from
    chains at a temperature the grain that their noise is; they are no samples of the run's law any more."""
    if not steps:
        return z
    condition, quiet = build.condition(run.settings), with_sampler(run, "gd")
    masks = [None if condition is None else condition.free(part) for part in z.split(_DESCENDING)]
    parts = [
        moved(quiet, part, steps=steps, fused=fused, mask=mask, replicas=1)
        for part, mask in zip(z.split(_DESCENDING), masks, strict=True)
    ]
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------ the VAE and its pairs


def pairs(run: Run, count: int, *, steps: int | None = None, seed: int = 0, fused: bool = True) -> Pairs:
    """Proposals of the run's VAE, and where ``steps`` transitions (default: as in training) take each."""
    z = sample(run, count, steps=0, start="vae", seed=seed)
    steps = run.settings.steps if steps is None else steps
    return Pairs(z, moved(run, z, steps=steps, seed=seed, fused=fused))


@torch.no_grad()
def interpolated(vae: VAE, rows: int, columns: int, *, seed: int, update: int) -> Tensor:
    """(rows * columns, ...): in each row the proposals between two latents of N(0, I), both included.

    In equal steps of the angle between them and of their length, so that on the way too the latents are as long as
    those that the decoder has learned from (White 2016).
    """
    device = next(vae.parameters()).device
    ends = noise.normal((2 * rows, vae.latent), seed=seed, step=update, stream=Stream.LATENT, device=device)
    lengths = ends.norm(dim=1, keepdim=True)
    (a, b), (short, long) = ((x[0::2, None], x[1::2, None]) for x in (ends / lengths, lengths))
    angle = torch.acos((a * b).sum(-1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6))
    t = torch.linspace(0, 1, columns, dtype=torch.float32, device=device)[None, :, None]
    directions = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return vae.decode((directions * torch.lerp(short, long, t)).flatten(0, 1))


@torch.no_grad()
def reconstructed(vae: VAE, x: Tensor) -> Tensor:
    """What the VAE makes of states (N, ...): the decoded means of their posteriors."""
    return vae.decode(vae.encode(x).mean, x)


# ------------------------------------------------------------------------------------------------------ missing regions


class Completed(NamedTuple):
    """Held-out images, what was taken away of them, and what was put there."""

    truth: Tensor  #: (N, C, H, W)
    missing: Tensor  #: (N, 1, H, W) bool
    proposals: Tensor | None  #: (N, M, C, H, W) the VAE's alone, where the run has a conditional one
    completions: Tensor  #: (N, M, C, H, W)


def completions(
    run: Run,
    dataset: build.Dataset,
    count: int,
    *,
    region: str | None = None,
    each: int = 4,
    steps: int | None = None,
    seed: int = 0,
    fused: bool = True,
    warm_up: int = 0,
) -> Completed:
    """``each`` completions of ``count`` held-out images with a region missing, one of `completion.REGIONS`.

    A run with task="completion" completes by its own law p(x | known) of its own region: its VAE proposes, and the
    sampler revises in ``steps`` transitions, by default as many as in training. Any other run of images inpaints: the
    region starts from uniform noise, and the sampler of p(x), in ten times as many transitions by default, moves it
    alone, by its step's mask; with classes it is that of p(x | y), y the image's own. Raises ValueError for a run of
    vectors, or a region that cannot be.
    """
    if run.chains.dim() != 4:
        raise ValueError(f"run must be of images to complete them, got one of {run.settings.data}")
    conditional = run.settings.task == "completion"
    if conditional and region not in (None, run.settings.mask):
        raise ValueError(f"mask must be {run.settings.mask}, which the run has learned to complete, got {region}")
    labelled = run.classes is not None
    held = dataset.images if conditional or labelled else dataset
    update, device = updates_past(run), run.chains.device
    where = dict(seed=seed, step=update, purpose="held-out", device=device)
    known = completion.Completions(held, region or run.settings.mask).draw(count, **where)
    given = known.repeat_interleave(each, 0)
    free = completion.free(given)
    if conditional:
        z = proposals(run.vae, len(given), seed=seed, update=update, given=given)
        steps = run.settings.steps if steps is None else steps
        done = completion.images(moved(run, z, steps=steps, seed=seed, fused=fused, warm_up=warm_up, mask=free))
    else:
        shape = completion.images(given).shape
        z = completion.fill(given, starts.from_noise(shape, held.box, seed=seed, step=update, device=device))
        z, free = completion.images(z), free[:, :-1]
        if labelled:
            own = classes.labels(dataset.draw(count, **where)).repeat_interleave(each, 0)
            z, free = classes.state(z, own), torch.cat((free, free[:, :1]), 1)
        steps = 10 * run.settings.steps if steps is None else steps
        how = dict(steps=steps, seed=seed, fused=fused, warm_up=warm_up)
        done = moved(run, z, **how, mask=free, replicas=1)  # states with a part held cannot trade places
        done = classes.images(done) if labelled else done
    proposed = completion.images(z).unflatten(0, (count, each)) if conditional else None
    return Completed(completion.images(known), completion.missing(known), proposed, done.unflatten(0, (count, each)))
