"""The rows of updates: chains and the parameters' step, of the default job and others."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch

from fastanila.training import job as job_training
from fastanila.training.settings import Settings

from . import rival_updates, workloads
from .row import AUTHORS, MALA_BY_HAND, OURS, PLAIN, UNADJUSTED, Builders, Row
from .workloads import Way

Prepare = Callable[..., tuple[job_training.Job, Way]]  #: (changes of the row's settings) -> a job and its updates
WayOf = Callable[[Prepare], Way]
SettingsOf = Callable[[torch.device], contextlib.AbstractContextManager[Settings]]


def update_rows(device_type: str) -> list[Row]:
    steps, cuda = 60, device_type == "cuda"
    default = functools.partial(workloads.rings_settings, steps=steps)
    unadjusted = functools.partial(default, sampler="anila")  # as most rivals have it
    of_default: dict[str, WayOf] = {  # the job of a bare `python -m fastanila.train --fused`, whose sampler is exact
        OURS: ours(),
        UNADJUSTED: ours(sampler="anila"),
        PLAIN: plain(),
        MALA_BY_HAND: by_hand(rival_updates.eager_mala_update),
    }
    of_images: dict[str, WayOf] = {OURS: ours(), "eager": by_hand(rival_updates.eager_update)}
    of_rings = of_images | {AUTHORS: by_hand(rival_updates.authors_update)}
    of_vae: dict[str, WayOf] = {
        OURS: ours(init="vae"),
        PLAIN: plain(init="vae"),
        "fastanila, persistent chains": ours(),
    }
    rings, pictures = (512, 2), (64, 3, 32, 32)
    goals = {AUTHORS: 40.0 if cuda else 1.0, "eager": 1.0}
    found = [
        update_row(f"rings, the default, K={steps}", rings, default, of_default, {MALA_BY_HAND: 1.0, PLAIN: 1.0}),
        update_row(f"rings, K={steps}", rings, unadjusted, of_rings, goals),
        update_row(f"rings, a VAE proposes, K={steps}", rings, unadjusted, of_vae, {}),
    ]
    if cuda:  # less the authors' form, which the host of a GPU holds up for a second a call
        images = functools.partial(workloads.image_settings, steps=steps, precision="bf16")
        found.append(update_row(f"64 x 3x32x32, K={steps}, bf16", pictures, images, of_images, {"eager": 1.0}, "bf16"))
    return found


def update_row(
    work: str, shape: tuple[int, ...], settings_of: SettingsOf, ways: Mapping[str, WayOf], goals: dict[str, float],
    dtype: str = "float32",
) -> Row:  # fmt: skip
    def build(device, closing) -> Builders:
        @functools.cache
        def prepare(**changes) -> tuple[job_training.Job, Way]:
            settings = closing.enter_context(settings_of(device))
            return workloads.our_update(dataclasses.replace(settings, **changes))

        return {name: functools.partial(way, prepare) for name, way in ways.items()}

    return Row("update", f"one update, {work}", shape, dtype, build, {OURS: goals} if goals else {})


def ours(**changes) -> WayOf:
    return lambda prepare: prepare(**changes)[1]


def plain(**changes) -> WayOf:
    """The plain definition, eagerly."""
    return lambda prepare: workloads.plainly(prepare(fused=False, **changes)[1])


def by_hand(form: Callable[..., Way]) -> WayOf:
    """An update in one of the forms of `rival_updates`, of our job's network on the job's data."""

    def way(prepare: Prepare) -> Way:
        job, _ = prepare()
        energy = workloads.Ordinary(job.ebm.module, job.settings.precision).to(job.device)
        pool = job.data.draw(4096, seed=0, step=0, device=job.device)
        return workloads.in_precision(form(energy, pool, job.settings), job.settings.precision)

    return way
