"""One update of the parameters: Algorithm 1 of Karimi, Xie and Li, as a function of what lies on the device.

An update draws data, starts chains, moves them K transitions of the sampler, and takes an Adam step along
mean grad U(data) - mean grad U(chains). With init="vae" the chains start at what a VAE proposes, and the VAE takes an
Adam step of its own along its ELBO's gradient at where the chains end (Xie, Zheng and Li). With init="weighted" means
over chains are weighted, and the weights follow the step: see `samplers.weighted`. Updates of a warm-up by matching
have no chains: see `matching`. An update reads nothing back: the number of updates made and whether they are
still finite are tensors too, so that on CUDA the whole of it is one graph, captured once and replayed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import noise
from ..graphs import compiled, replayed
from ..models.score import sampling
from ..models.wrappers import for_chains
from ..noise import Stream
from ..samplers import starts
from ..samplers.chain import chain_of
from ..samplers.state import Info, State, mapped
from . import build
from .defaults import ENERGIES
from .job import Job
from .learner import as_number, averaged_parameters, clipped_norm, follow, gradients, move
from .losses import ELBO, Classification, Likelihood, elbo, likelihood
from .matching import matching
from .weighing import build_weighing

#: An energy beyond this has left everything that training could bring back.
_LARGEST_ENERGY = 1e8
#: By what the VAE's weight of KL is multiplied where its warm-up begins.
_FIRST_KL = 10.0
#: Updates that run as they are ahead of the capture: they compile, and give every library its workspace.
WARM_UP = 3


class Teaching(NamedTuple):
    """What one update saw of the VAE: 0-dim each."""

    reconstruction: Tensor  #: of `losses.elbo`, as is the next
    kl: Tensor


class Update(NamedTuple):
    """What one update did; on CUDA the next overwrites it."""

    energy_data: Tensor  #: 0-dim, as are the next two
    energy_chains: Tensor
    grad_norms: list[Tensor]  #: of each learner, ahead of clipping; 0-dim
    matching: Tensor | None  #: the matching loss, 0-dim
    info: Info | None  #: the chains' last transition
    teaching: Teaching | None  #: of init="vae"
    classification: Classification | None = None  #: of the data, with classes


def build_update(job: Job, *, matches: bool = False) -> Callable[[], Update]:
    """update(), which draws, samples and moves the parameters, unless something is not finite: then ``job.broken`` is
    set and nothing else changes, in this call and in all that follow. ``matches``: an update of the warm-up by
    matching, which moves no chains."""
    s, device = job.settings, job.device
    energy = build.at_precision(job.ebm.module, s.precision)
    on_chains = for_chains(energy) if s.fused else energy
    # An energy of the user's own that does not compile may run eagerly, with a warning; not where all is one graph.
    strict = s.energy in ENERGIES or compiles_once(device)
    sampler = build.with_replicas(job.sampler, s)
    chain = chain_of(sampler, on_chains, z=job.chains, compile=s.fused, capture=False, strict=strict)
    numbers = sampler.numbers_on(device)
    step_size = as_number(float(s.step_size), device)
    one = torch.ones((), dtype=torch.float32, device=device)
    # tensors, because a number would be a constant of what is compiled, and another one would compile it anew
    of = (s.steps, s.ema, s.energy_l2, s.clip_grad, s.kl_weight, s.vae_warm_up, s.data_noise)
    steps, ema, energy_l2, clip_grad, kl, warm_up, data_noise = (as_number(x, device) for x in of)
    class_weight, matching_weight = (as_number(x, device) for x in (s.class_weight, s.matching_weight))
    schedules = [learner.rate.on(device) for learner in job.learners]
    seed, factor = job.seed, job.lr_factor
    rates = [group["lr"] for learner in job.learners for group in learner.optimizer.param_groups]

    def cold(x: Tensor) -> Tensor:
        """Of what has rows for all replicas, the cold ones, which alone teach."""
        return x if s.replicas == 1 else x[: s.batch_size]

    def begin(iteration: Tensor):
        """What an update draws, and the step of its first transition: a chain's index is its place in this update's
        batch, and transitions never share a step, so no noise repeats."""
        batch, free = draw_data(job, iteration, seed, data_noise)
        start, xi = job.start.draw(iteration, batch), None
        if job.vae is not None:
            shape = (s.batch_size, job.vae.module.latent)
            xi = noise.normal(shape, seed=seed, step=iteration, stream=Stream.POSTERIOR, device=device)
        return batch, free, start, xi, iteration * steps

    def match(batch: Tensor, iteration: Tensor) -> Tensor:
        how = dict(seed=seed, step=iteration, device=device)
        begins = starts.from_noise(batch.shape, job.data.box, stream=Stream.MATCHING, **how)
        times = noise.uniform((len(batch), *[1] * (batch.dim() - 1)), stream=Stream.TIMES, **how)
        return matching(energy, batch, begins, times, step_size)

    @torch.no_grad()
    def watched(batch: Tensor, start: Tensor, loss: Tensor) -> Likelihood:
        """The energies of an eighth of the data, and of the noise, which show where a run goes; all of them would take
        a fifth of the update."""
        few = slice(-(-len(batch) // 8))
        return Likelihood(loss, energy(batch[few]).mean(), energy(start[few]).mean())

    def learn(batch: Tensor, chains: Tensor, log_weights: Tensor | None) -> Likelihood:
        l2 = energy_l2 if s.energy_l2 else 0.0
        return likelihood(energy, batch, chains, l2, class_weight if s.classes else None, log_weights)

    def teach(batch: Tensor, chains: Tensor, xi: Tensor, iteration: Tensor) -> ELBO:
        lesson = torch.where(iteration < warm_up, batch, chains) if s.vae_warm_up else chains
        return elbo(job.vae.module, lesson, kl_weight(kl, warm_up if s.vae_warm_up else None, iteration), xi)

    def settle(iteration: Tensor, batch_energies: list[Tensor], norms, grads, z: Tensor, start: Tensor):
        """Judge whether all is finite, and if it is, keep what the update has made, all but the parameters."""
        clip = clip_grad if s.clip_grad else None
        totals = [clipped_norm(norms_of, of, clip) for norms_of, of in zip(norms, grads, strict=True)]
        small = torch.stack(batch_energies).abs() < _LARGEST_ENERGY
        finite = small.all() & torch.isfinite(z).all() & torch.isfinite(torch.stack(totals)).all()
        broken = job.broken | ~finite
        for rate, schedule in zip(rates, schedules, strict=True):
            rate.copy_(schedule.at(iteration) * factor)
        decays = [torch.where(broken, 1.0, average_decay(iteration - x.first, ema)) for x in schedules]
        job.start.keep(iteration, z, unless=broken)
        job.chains.copy_(torch.where(broken, job.chains, cold(z)))
        if job.proposals is not None:
            job.proposals.copy_(torch.where(broken, job.proposals, start))
        job.broken.copy_(broken)
        job.made.copy_(iteration + (~broken).long())
        return totals, broken.float(), decays

    on_cuda = device.type == "cuda"
    # What runs once an update: on a CPU it takes a twentieth of it, and would take longer to compile than that saves.
    compile = compiled if s.fused and compiles_once(device) else lambda function: function
    begin_of, learn_of, teach_of, settle_of, follow_of = map(compile, (begin, learn, teach, settle, follow))
    weighing = build_weighing(job, energy, compile, strict=strict) if s.init == "weighted" else None

    def update() -> Update:
        for learner in job.learners:
            learner.module.train()
            learner.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad(), sampling(energy):
            batch, free, start, xi, first = begin_of(job.made)
            state, info = State(start), None
            if not matches:
                if s.fused:
                    for_chains(energy)  # the parameters of now
                state, info = chain(s.steps, numbers, state, seed, first, 0, free)
            chains, info = cold(state.z), mapped(cold, info)
            moved = None if weighing is None else weighing.move(state.z, seed, first)
        matched = match(batch, job.made) if matches or s.matching_weight else None
        if matches:
            matched.backward(one)
            result = watched(batch, chains, matched)
        else:
            result = learn_of(batch, chains, None if weighing is None else job.start.walkers.log_weights)
            (result.loss if matched is None else result.loss + matching_weight * matched).backward(one)
        teaching = None
        if job.vae is not None:
            lesson = teach_of(batch, chains, xi, job.made)
            lesson.loss.backward(one)
            teaching = Teaching(lesson.reconstruction, lesson.kl)
        with torch.no_grad():
            grads = [gradients(learner) for learner in job.learners]
            norms = iter(torch._foreach_norm([g for of in grads for g in of]))
            norms = [list(itertools.islice(norms, len(of))) for of in grads]
            energies = [result.energy_data, result.energy_chains]
            if moved is not None:
                energies += [u.mean().float() for u in moved[:2] if len(u)]
            totals, broken, decays = settle_of(job.made, energies, norms, grads, state.z, start)
            for learner in job.learners:
                move(learner, unless=broken)
            if job.ebm.average is not None:
                follow_of(*averaged_parameters(job.learners), decays)
            if weighing is not None:
                weighing.follow(job.made, moved, broken)
        matched = None if matched is None else matched.detach()
        return Update(result.energy_data, result.energy_chains, totals, matched, info, teaching, result.classification)

    return replayed(update, device, "the update", warm_up=WARM_UP) if s.fused and on_cuda else update


def compiles_once(device: torch.device) -> bool:
    """Whether it pays to compile what runs once an update."""
    return device.type == "cuda"


def average_decay(made: Tensor, most: Tensor) -> Tensor:
    """The decay of a moving average: small while few updates have been ``made`` since its network began to learn."""
    made = torch.clamp(made, min=0)
    return torch.clamp(((1 + made) / (10 + made)).float(), max=most)


@torch.no_grad()
def revision(job: Job) -> dict[str, float]:
    """The last update's proposals, and how its transitions changed them, of init="vae".

    energy_proposals: mean U of them, by the energy as the update left it. moved: root mean square, over the elements
    that may move, of revised less proposal; units of data. spread: standard deviation of the proposals over the batch,
    divided by that of the revised.
    """
    condition = build.condition(job.settings)
    free = None if condition is None else condition.free(job.chains)
    share = 1.0 if free is None else free.float().mean()
    moved = ((job.chains - job.proposals).square().mean() / share).sqrt()
    spread = (_variance(job.proposals, free) / _variance(job.chains, free)).sqrt()
    with sampling(job.ebm.module):
        energy = build.at_precision(job.ebm.module, job.settings.precision)(job.proposals).mean()
    return {"energy_proposals": energy.item(), "moved": moved.item(), "spread": spread.item()}


def _variance(x: Tensor, free: Tensor | None) -> Tensor:
    """The mean over a state's elements, those that may move, of their variance over the batch."""
    variances = x if free is None else torch.where(free, x, 0.0)
    return variances.var(0, unbiased=False).mean()


def draw_data(
    job: Job, iteration: int | Tensor, seed: int | Tensor, data_noise: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """An update's data, and which of its elements chains may move: all (None), or all but what states carry with them.

    data_noise: a 0-dim tensor in place of the settings' number."""
    s = job.settings
    batch = job.data.draw(s.batch_size, seed=seed, step=iteration, device=job.device)
    if s.flips:
        u = noise.uniform((len(batch), 1, 1, 1), seed=seed, step=iteration, stream=Stream.FLIPS, device=job.device)
        batch = torch.where(u <= 0.5, batch.flip(-1), batch)
    condition = build.condition(s)
    free = None if condition is None else condition.free(batch)
    if s.data_noise:
        normals = noise.normal(batch.shape, seed=seed, step=iteration, stream=Stream.DATA_NOISE, device=job.device)
        scale = s.data_noise if data_noise is None else data_noise
        batch = batch + scale * (normals if free is None else torch.where(free, normals, 0.0))
    return batch, free


def kl_weight(weight: float | Tensor, warm_up: Tensor | None, iteration: Tensor) -> float | Tensor:
    """The weight of KL in the VAE's loss. In the warm-up it falls geometrically to its own: a decoder with much noise
    of its own learns to cover all that there is, and then the detail."""
    return weight if warm_up is None else weight * _FIRST_KL ** torch.clamp(1 - (iteration / warm_up).float(), min=0.0)
