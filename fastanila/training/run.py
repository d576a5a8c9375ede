"""A trained run, read back."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import images, registry
from ..models import vae
from ..models.wrappers import Tempered
from ..samplers import EXACT, SAMPLERS, weighted
from ..samplers.sampler import Sampler
from . import checkpoint, config, defaults, own
from .build import Dataset, at_precision, build_energy, build_sampler, build_vae, device_of, load_data
from .checkpoint import load_parameters
from .contents import MISSING, Network, unpacked
from .settings import Settings


class Run(NamedTuple):
    energy: nn.Module  #: the moving average where the run keeps one, in eval mode
    sampler: Sampler
    #: (B, ...) the chains as the run left them; of replicas the cold ones, of init="weighted" resampled by weight
    chains: Tensor
    settings: Settings
    iteration: int  #: updates made
    vae: vae.VAE | None = None  #: of init="vae": what proposes where chains start; its moving average, as the energy's
    fingerprint: dict | None = None  #: of the data it was trained on (`data.Images.fingerprint`); None if not known
    box: tuple[float, float] | None = None  #: (low, high) of the data, in a checkpoint of data of one's own
    data: Any = None  #: the user's own data, as `load` was given them
    classes: int | None = None  #: how many, of a run with classes: its states carry theirs (`fastanila.data.classes`)


def load(
    directory: str | Path, device: str = "auto", *, energy: nn.Module | None = None, data: Any = None
) -> Run:  # fmt: skip
    """A trained run from its directory: the newest whole checkpoint.

    A run whose settings name an energy as package.module:function imports it, which runs that module's code: load such
    a run only where you trust it. ``energy`` and ``data``: the user's own, as for `loop.train`, in place of what the
    settings name, and where the run's were given from Python. A copy of the energy gets the run's parameters. The data
    are needed for what reads them only: evaluation, and pictures in two dimensions.

    Raises FileNotFoundError if it is no run or has no checkpoint yet, `checkpoint.CheckpointError` if all are damaged
    or the energy is another one, ValueError where the run's own energy cannot be found.
    """
    directory = config.path_of("run", directory)
    with torch.inference_mode(False), torch.device("cpu"):  # whatever torch's mode and default device are
        return _load(directory, device_of(device), energy, data)


def _load(directory: Path, device: torch.device, energy: nn.Module | None, data: Any) -> Run:
    settings = read_settings(directory)
    refuse_given(settings, directory, energy, data)
    if energy is None and own.is_given(settings.energy):
        raise ValueError(own.not_found("energy", settings.energy, str(directory)))
    found = unpacked(*checkpoint.load_latest(directory / "checkpoints", device))
    shape = tuple(found.chains.shape[1:])
    box = registry.box_of(settings.data) if found.box is None else found.box

    def trained(network: nn.Module, of: Network) -> nn.Module:
        parameters = (of.average or {}) if settings.ema else of.parameters
        load_parameters(network.to(device), parameters, directory)
        return network.eval()

    network = build_energy(settings, shape, copy.deepcopy(energy), found.classes)
    model = at_precision(trained(network, found.energy), settings.precision)
    proposer = trained(build_vae(settings, shape, box), found.vae or MISSING) if settings.init == "vae" else None
    sampler, chains = build_sampler(settings, box), found.chains[: settings.chains]
    if "log_weights" in found.start:
        seed = found.rollbacks[-1].seed if found.rollbacks else settings.seed
        chains = weighted.evenly(chains, found.start["log_weights"], seed=seed, step=found.iteration)
    return Run(model, sampler, chains, settings, found.iteration, proposer, found.fingerprint, box, data, found.classes)


def refuse_given(settings: Settings, directory: str | Path, energy: Any, data: Any) -> None:
    """Raise ValueError where an energy or data are given for a run that has none of the user's own."""
    for name, thing in (("energy", energy), ("data", data)):
        if thing is not None and not own.is_own(value := getattr(settings, name)):
            raise ValueError(f"{name} cannot be given for {directory}, which has {name}={value}")


def box_of(run: Run) -> tuple[float, float]:
    """(low, high) of every element of the run's data."""
    return registry.box_of(run.settings.data) if run.box is None else run.box


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
    replicas = before.replicas if sampler in EXACT else 1
    settings = dataclasses.replace(before, sampler=sampler, refresh=refresh, replicas=replicas, **own)
    config.check(settings)
    heated = sampler in EXACT and before.noise_scale != 1.0
    energy = Tempered(run.energy, before.noise_scale**2).eval() if heated else run.energy
    return run._replace(energy=energy, sampler=build_sampler(settings, box_of(run)), settings=settings)


def updates_past(run: Run) -> int:
    """An update that lies past all of training, so that the same seed does not repeat its noise."""
    return max(run.iteration, run.settings.iterations)


def read_settings(directory: str | Path) -> Settings:
    path = config.path_of("run", directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a run: it has no config.json")
    return config.resolve(Settings(**config.read(path)))


def resumed_settings(settings: Settings, directory: str | Path) -> Settings:
    """The settings to go on with. Raises ValueError for one that would change the numbers of the run."""
    before = read_settings(directory)
    if settings.init == "weighted" and math.isinf(settings.reference_sd):  # fitted to the data where the run began
        settings = dataclasses.replace(settings, reference_sd=before.reference_sd)
    for field in dataclasses.fields(Settings):
        was, now = getattr(before, field.name), getattr(settings, field.name)
        if was != now and field.name not in config.RESUMABLE and field.name != "out":
            raise ValueError(f"{field.name} cannot change when a run is resumed: {directory} has {was!r}, got {now!r}")
    return settings


def data_of(run: Run, data_dir: str | None = None) -> Dataset:
    """`load_data` of a trained run, on its chains' device, with a warning if they are not what it was trained on.

    Raises ValueError where they were given from Python, and `load` was not given them.
    """
    dataset = load_data(run.settings, run.chains.device, data_dir, run.data)
    if changed := images.changes(run.fingerprint, dataset.fingerprint):
        what = "data" if own.is_own(run.settings.data) else "images"
        told = f"the {what} are not those the run was trained on, of which some may be held out now"
        warnings.warn(f"{told}: {'; '.join(changed)}", stacklevel=2)
    return dataset
