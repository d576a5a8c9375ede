"""A run that diverges goes back to a checkpoint from before it did, with half the learning rates and a new seed.

Which is known from the job alone: a run that is resumed, from whichever checkpoint, rolls back where an uninterrupted
one does. So only checkpoints of every save_every-th update are gone back to, not those where somebody stopped the run.
"""

from __future__ import annotations

import warnings

from . import checkpoint
from .contents import Contents, Rollback, unpacked
from .job import Job, put_back, save, set_noise_and_rates

#: 2^64 divided by the golden ratio: the seeds seed + n times this are all far from one another, and from small numbers.
_APART = 0x9E3779B97F4A7C15


def roll_back(job: Job, diverged: int) -> str | None:
    """Go back from update ``diverged`` to the last good checkpoint; one line that says so.

    A run that diverges again from the same checkpoint, with none saved since, goes back to the one before it. Later
    checkpoints are deleted. None, and nothing has changed, where the settings want no rollback, none is left, or there
    is no checkpoint to go back to.
    """
    s, count = job.settings, len(job.rolled_back) + 1
    if s.on_divergence != "rollback" or count > s.rollbacks:
        return None
    good = list(job.good)
    if len(good) > 1 and job.rolled_back and job.rolled_back[-1].back_to == good[-1]:
        good.pop()
    found = _loaded(job, good)
    if found is None:
        return None
    put_back(job, found)
    job.good = good
    seed = (s.seed + count * _APART) % (1 << 64)
    job.rolled_back.append(Rollback(diverged, job.iteration, seed, 0.5 * job.rate))
    set_noise_and_rates(job)
    checkpoint.delete_after(job.directory / "checkpoints", job.iteration)
    save(job)
    rates = [f"--lr {s.lr * job.rate:.3g}"] + ([] if job.vae is None else [f"--vae-lr {s.vae_lr * job.rate:.3g}"])
    return (
        f"rollback {count} of at most {s.rollbacks}: diverged at update {diverged}; goes on from update "
        f"{job.iteration} as with {' and '.join(rates)}, and with new noise"
    )


def _loaded(job: Job, good: list[int]) -> Contents | None:
    """The last of the checkpoints that is whole; those after it are taken from the list."""
    while good:
        try:
            path = job.directory / "checkpoints" / f"{good[-1]:08d}.safetensors"
            return unpacked(*checkpoint.load(path, job.device))
        except (FileNotFoundError, checkpoint.CheckpointError) as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
            good.pop()
    return None
