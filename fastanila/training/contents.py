"""What the checkpoint of a run holds, under which names: the one place that says so, with its writer and its reader.

The tensors of the file:

    energy.<name>                     parameters and buffers of the energy
    ema.<name>                        the same of its moving average, where the run keeps one
    optimizer.<kind>.<parameter>      its Adam's state (`checkpoint.optimizer_tensors`)
    amortized.vae.<name>              of init="vae" the VAE's, in the same way
    amortized.ema.<name>
    amortized.optimizer.<kind>.<parameter>
    proposals                         (B, ...) where the last update started its chains, of init="vae"
    start.<name>                      what the chain start keeps: start.population (chains, ...) of init="persistent"
                                      and "weighted"; of that also start.witnesses (witnesses, ...), and
                                      start.log_weights and start.witness_log_weights, float64, one a chain
    chains                            (B, ...) where the last update left its chains, unless they are in a population

Its state, as JSON: iteration (updates made), seconds (spent in them), data (the data's fingerprint, or null), box
(low, high of the data), classes (how many, or null), rollbacks (each as a `Rollback`) and good (the checkpoints that
one may go back to, by their updates). Checkpoints of before have no classes, rollbacks and good, those before them no
box, and the oldest no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .checkpoint import prefixed, subset

_AMORTIZED = "amortized"


class Network(NamedTuple):
    """A network in training."""

    parameters: dict[str, Tensor]  #: and buffers, as its state_dict has them
    average: dict[str, Tensor] | None  #: the same of its moving average
    optimizer: dict[str, Tensor]  #: by the names of `checkpoint.optimizer_tensors`


#: Of a network that a checkpoint lacks: loading it says so.
MISSING = Network({}, None, {})


class Rollback(NamedTuple):
    """A run that diverged went back to an earlier checkpoint."""

    diverged: int  #: the update that was not finite, or at which the energies had run away
    back_to: int  #: the updates that it went on from
    seed: int  #: of all noise from there on, in place of the settings'
    rate: float  #: what the settings' learning rates are multiplied by from there on


class Contents(NamedTuple):
    """A run as a checkpoint has it."""

    energy: Network
    vae: Network | None
    start: dict[str, Tensor]
    chains: Tensor  #: all of a persistent population, otherwise the last update's
    proposals: Tensor | None
    iteration: int
    seconds: float
    fingerprint: dict[str, Any] | None
    box: tuple[float, float] | None
    rollbacks: Sequence[Rollback] = ()
    good: Sequence[int] = ()
    classes: int | None = None


def packed(contents: Contents) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) for `checkpoint.save`."""
    tensors = _network(contents.energy, "energy")
    if contents.vae is not None:
        tensors |= prefixed(_AMORTIZED, _network(contents.vae, "vae"))
        tensors["proposals"] = contents.proposals
    tensors |= prefixed("start", contents.start)
    if "population" not in contents.start:
        tensors["chains"] = contents.chains
    box = None if contents.box is None else list(contents.box)
    state = {"iteration": contents.iteration, "seconds": contents.seconds, "data": contents.fingerprint, "box": box}
    history = {"rollbacks": [rollback._asdict() for rollback in contents.rollbacks], "good": list(contents.good)}
    return tensors, state | history | {"classes": contents.classes}


def unpacked(tensors: dict[str, Tensor], state: dict[str, Any]) -> Contents:
    """The inverse of `packed`, of what `checkpoint.load` gives."""
    amortized, start = subset(tensors, _AMORTIZED), subset(tensors, "start")
    box = state.get("box")
    return Contents(
        energy=_read(tensors, "energy"),
        vae=_read(amortized, "vae") if amortized else None,
        start=start,
        chains=start["population"] if "population" in start else tensors["chains"],
        proposals=tensors.get("proposals"),
        iteration=state["iteration"],
        seconds=state["seconds"],
        fingerprint=state.get("data"),
        box=None if box is None else (box[0], box[1]),
        rollbacks=[Rollback(**made) for made in state.get("rollbacks", [])],
        good=state.get("good", []),
        classes=state.get("classes"),
    )


def _network(network: Network, name: str) -> dict[str, Tensor]:
    average = {} if network.average is None else prefixed("ema", network.average)
    return prefixed(name, network.parameters) | average | network.optimizer


def _read(tensors: dict[str, Tensor], name: str) -> Network:
    average = subset(tensors, "ema")
    optimizer = {key: tensor for key, tensor in tensors.items() if key.startswith("optimizer.")}
    return Network(subset(tensors, name), average or None, optimizer)
