"""A trained run, read back."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import images, registry
from ..models import vae
from ..models.wrappers import Tempered
from ..samplers import EXACT, SAMPLERS
from ..samplers.sampler import Sampler
from . import checkpoint, config, defaults
from .build import Dataset, at_precision, build_energy, build_sampler, build_vae, device_of, load_data
from .checkpoint import AMORTIZED, last_chains, load_parameters
from .settings import Settings


class Run(NamedTuple):
    energy: nn.Module  #: the moving average where the run keeps one, in eval mode
    sampler: Sampler
    chains: Tensor  #: (B, ...) the chains as the run left them
    settings: Settings
    iteration: int  #: updates made
    vae: vae.VAE | None = None  #: of init="vae": what proposes where chains start; its moving average, as the energy's
    fingerprint: dict | None = None  #: of the images it was trained on (`data.Images.fingerprint`); None if not known


def load(directory: str | Path, device: str = "auto") -> Run:
    """A trained run from its directory: the newest whole checkpoint.

    Raises FileNotFoundError if it is no run or has no checkpoint yet, `checkpoint.CheckpointError` if all are damaged.
    """
    directory = config.path_of("run", directory)
    with torch.inference_mode(False), torch.device("cpu"):  # whatever torch's mode and default device are
        return _load(directory, device_of(device))


def _load(directory: Path, device: torch.device) -> Run:
    settings = read_settings(directory)
    tensors, state = checkpoint.load_latest(directory / "checkpoints", device)
    chains = last_chains(tensors)

    def trained(network: nn.Module, tensors: dict[str, Tensor], name: str) -> nn.Module:
        which = "ema" if settings.ema else name
        load_parameters(network.to(device), checkpoint.subset(tensors, which), directory)
        return network.eval()

    energy = at_precision(trained(build_energy(settings, chains.shape[1:]), tensors, "energy"), settings.precision)
    proposer = None
    if settings.init == "vae":
        proposer = trained(build_vae(settings, chains.shape[1:]), checkpoint.subset(tensors, AMORTIZED), "vae")
    sampler = build_sampler(settings, registry.box_of(settings.data))
    return Run(energy, sampler, chains, settings, state["iteration"], proposer, state.get("data"))


def with_sampler(run: Run, sampler: str, **changes: Any) -> Run:
    """The run with another sampler for its model, by the name that the commands know it by.

    Threshold and step size are translated (`defaults.translated`) unless ``changes`` (threshold, step_size, norm,
    leapfrog_steps) gives them; a frozen gain stays with AniLA only. A model that was trained at a temperature sigma^2
    is given to an exact sampler, which has no noise scale, as U / sigma^2. Raises ValueError for an unknown name, a
    setting that the sampler has not, or one that cannot be.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    known = {f.name for f in dataclasses.fields(SAMPLERS[sampler])}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"{name} is no setting of {sampler}, which has {', '.join(sorted(known))}; got {value}")
    before = run.settings
    own = defaults.translated(vars(before), before.sampler, sampler, changes.get("step_size")) | changes
    refresh = before.refresh if "refresh" in known else "transition"
    settings = dataclasses.replace(before, sampler=sampler, refresh=refresh, **own)
    config.check(settings)
    heated = sampler in EXACT and before.noise_scale != 1.0
    energy = Tempered(run.energy, before.noise_scale**2).eval() if heated else run.energy
    return run._replace(energy=energy, sampler=build_sampler(settings, registry.box_of(before.data)), settings=settings)


def updates_past(run: Run) -> int:
    """An update that lies past all of training, so that the same seed does not repeat its noise."""
    return max(run.iteration, run.settings.iterations)


def read_settings(directory: str | Path) -> Settings:
    path = config.path_of("run", directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a run: it has no config.json")
    return config.resolve(Settings(**config.read(path)))


def data_of(run: Run, data_dir: str | None = None) -> Dataset:
    """`load_data` of a trained run, on its chains' device, with a warning if they are not what it was trained on."""
    dataset = load_data(run.settings, run.chains.device, data_dir)
    if changed := images.changes(run.fingerprint, dataset.fingerprint):
        told = "the images are not those the run was trained on, of which some may be held out now"
        warnings.warn(f"{told}: {'; '.join(changed)}", stacklevel=2)
    return dataset
