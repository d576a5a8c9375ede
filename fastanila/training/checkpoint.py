"""Checkpoints that are whole or absent: written atomically, verified when read, and never a pickle.

A checkpoint is one safetensors file: named tensors, and in the header's metadata the JSON of a small state
(counters and the like) with a SHA-256 digest over the state and every tensor's name, dtype, shape and bytes. A file
is written under a temporary name beside its place, forced to disk, and only then renamed: whatever stops the
writer, and whenever, the name holds the old content or the new.

No file is larger than 16 MB: what does not fit goes on in shards beside it, safetensors files too, named by the digest
(NAME-1-DIGEST.safetensors). A tensor too large for what is left of a file is cut between two rows, and a tensor of that
name stands in each. All shards are on disk before the file that names them replaces the old one, so the checkpoint is
new as a whole when that one name is. The digest is over the tensors put together again.

One writer at a time for each directory; any number of readers.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..files import write_bytes
from . import shards

_NUMBERED = re.compile(r"(\d{8,})\.safetensors")
_UNTOUCHED = "untouched"
#: what optimizers keep once for each parameter as a number; everything else has the parameter's shape and dtype
_SCALARS = ("step", "mu_product")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or does not fit what it is restored into."""


def save(path: str | Path, tensors: dict[str, Tensor], state: dict) -> list[Path]:
    """Write ``tensors`` (any dtype safetensors knows, device, layout and aliasing) and the JSON-able ``state``; returns
    the paths of its shards.

    The directory must exist. What JSON cannot hold raises TypeError, a full disk OSError; the checkpoint at ``path``,
    if there is one, is then untouched.
    """
    path = Path(path)
    # a copy of each: safetensors refuses storage shared between tensors and writes what is contiguous
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    text = json.dumps(state)
    digest = _digest(tensors, text)
    first, *others = shards.parts(tensors, shards.LARGEST)
    beside = shards.paths(path, digest, len(others))
    for shard, part in zip(beside, others, strict=True):
        write_bytes(shard, safetensors.torch.save(part))
    metadata = {"state": text, "sha256": digest}  # and nothing that the digest does not cover
    if beside:  # whose names and number it covers by what they hold
        metadata["shards"] = json.dumps([shard.name for shard in beside])
    write_bytes(path, safetensors.torch.save(first, metadata))
    return beside


def load(path: str | Path, device="cpu") -> tuple[dict[str, Tensor], dict]:
    """The tensors, on ``device``, and the state that `save` wrote, bit for bit.

    CheckpointError names the file and what is wrong with it; a file that is not there is FileNotFoundError.
    """
    path = Path(path)
    blob = path.read_bytes()  # read, not mapped: what is verified is what is returned
    tensors, metadata = _read(path, blob)
    if "state" not in metadata or "sha256" not in metadata:
        raise CheckpointError(f"{path}: a safetensors file without fastanila's state and digest")
    parts = [tensors]
    try:
        for name in json.loads(metadata.get("shards", "[]")):
            shard = path.with_name(Path(name).name)
            parts.append(_read(shard, shard.read_bytes())[0])
    except FileNotFoundError as error:
        if path.read_bytes() != blob:  # saved anew meanwhile
            return load(path, device)
        raise CheckpointError(f"{path}: its shard {error.filename} is missing") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: the names of its shards cannot be read ({error})") from None
    try:
        tensors = shards.joined(parts)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: the pieces of its tensors do not go together ({error})") from None
    if _digest(tensors, metadata["state"]) != metadata["sha256"]:
        raise CheckpointError(f"{path}: the content does not match its digest, so the file is damaged")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, json.loads(metadata["state"])


def _read(path: Path, blob: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    try:
        tensors = safetensors.torch.load(blob)
        metadata = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")]).get("__metadata__", {})
    except MemoryError:
        raise
    except Exception as error:  # a damaged header surfaces as any of half a dozen types
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    return tensors, metadata


def save_numbered(
    directory: str | Path,
    iteration: int,
    tensors: dict[str, Tensor],
    state: dict,
    keep: int = 2,
    also: Collection[int] = (),
) -> Path:
    """Save as ``directory/00001234.safetensors``; once it is safe, delete all but the ``keep`` highest numbers and
    those in ``also``.

    The file just written is never deleted, also where older ones have higher numbers. Returns its path.
    """
    if iteration < 0 or keep < 1:
        raise ValueError(f"iteration must be at least 0 and keep at least 1, got {iteration} and {keep}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob(".*.safetensors.*.tmp"):  # first, since a killed writer may have filled the disk
        stale.unlink(missing_ok=True)
    shards.delete_alone(directory)
    path = directory / f"{iteration:08d}.safetensors"
    beside = save(path, tensors, state)
    for old in _numbered(directory)[:-keep]:
        if old != path and _number(old) not in also:
            old.unlink(missing_ok=True)
    shards.delete_alone(directory, path, beside)
    return path


def delete_after(directory: str | Path, iteration: int) -> None:
    """Delete the checkpoints with higher numbers, the highest first, so that whenever it is stopped the rest are those
    of a run that came less far."""
    for path in reversed(_numbered(Path(directory))):
        if _number(path) > iteration:
            path.unlink(missing_ok=True)
    shards.delete_alone(Path(directory))


def latest(directory: str | Path) -> Path | None:
    """The checkpoint with the highest number, or None; not verified, see `load_latest`."""
    return max(_numbered(Path(directory)), key=_number, default=None)


def numbers(directory: str | Path) -> list[int]:
    """Of the checkpoints in a directory, lowest first; not verified."""
    return [_number(path) for path in _numbered(Path(directory))]


def load_latest(directory: str | Path, device="cpu") -> tuple[dict[str, Tensor], dict]:
    """`load` the newest checkpoint that is whole, with a warning for each damaged one that is passed over.

    FileNotFoundError where ``directory`` has no checkpoint, CheckpointError where it has none that is whole.
    """
    tried: set[Path] = set()
    damaged = False
    while path := max(set(_numbered(Path(directory))) - tried, key=_number, default=None):
        tried.add(path)
        try:
            return load(path, device)
        except FileNotFoundError:  # deleted meanwhile by a run that goes on, which has made others before: look again
            pass
        except CheckpointError as error:
            warnings.warn(f"damaged checkpoint passed over: {error}", stacklevel=2)
            damaged = True
    if not damaged:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    raise CheckpointError(f"every checkpoint in {directory} is damaged")


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put "prefix." before every name; `subset` is the inverse."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def subset(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins with "prefix.", without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimizer's state as ``optimizer.<kind>.<parameter>``, such as ``optimizer.exp_avg.0.weight``.

    ``names`` are the parameters' names in the optimizer's order. A parameter that has no state yet gets an empty
    ``optimizer.untouched.<parameter>``, so that state that is missing can be told from state that never was.
    Learning rates and other settings are not included. Refuses state that is not tensors (LBFGS) with TypeError.
    """
    tensors = {}
    for name, (parameter, _) in zip(names, _parameters(optimizer, names), strict=True):
        kinds = {kind: v for kind, v in optimizer.state.get(parameter, {}).items() if v is not None}
        for kind, value in (kinds or {_UNTOUCHED: torch.empty(0, dtype=torch.float32, device="cpu")}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {kind} of {name} is {type(value).__name__}, not a tensor")
            tensors[f"optimizer.{kind}.{name}"] = value
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: dict[str, Tensor]) -> None:
    """Give the optimizer the state that `optimizer_tensors` took; other names in ``tensors`` are ignored.

    An entry that is missing, left over or of another shape or dtype raises CheckpointError naming it, and the
    optimizer is as before. The state is new tensors: restore before a graph that reads them is captured.
    """
    entries = subset(tensors, "optimizer")
    kinds = sorted({entry.partition(".")[0] for entry in entries} - {_UNTOUCHED})
    states = {}
    for name, (parameter, group) in zip(names, _parameters(optimizer, names), strict=True):
        if entries.pop(f"{_UNTOUCHED}.{name}", None) is not None:
            continue
        states[parameter] = state = {}
        for kind in kinds or [_UNTOUCHED]:
            value = entries.pop(f"{kind}.{name}", None)
            if value is None:
                raise CheckpointError(f"optimizer.{kind}.{name} is missing")
            state[kind] = _placed(f"optimizer.{kind}.{name}", kind, value, parameter, group)
    if entries:
        raise CheckpointError(f"optimizer.{min(entries)} belongs to no parameter of this optimizer")
    optimizer.state.clear()
    optimizer.state.update(states)


def _placed(entry: str, kind: str, value: Tensor, parameter: Tensor, group: dict) -> Tensor:
    """A copy of an optimizer's tensor where, and in the layout in which, torch's optimizers keep it."""
    if kind in _SCALARS:
        if value.shape != ():
            raise CheckpointError(f"{entry} has shape {tuple(value.shape)}, expected ()")
        on_device = group.get("capturable") or group.get("fused")
        return value.to(parameter.device if on_device else "cpu", copy=True)
    if value.shape != parameter.shape or value.dtype != parameter.dtype:
        raise CheckpointError(
            f"{entry} is {value.dtype} of shape {tuple(value.shape)}, "
            f"expected {parameter.dtype} of shape {tuple(parameter.shape)}"
        )
    return torch.empty_like(parameter, requires_grad=False).copy_(value)  # keeps channels_last


def _parameters(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> list[tuple[Tensor, dict]]:
    found = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    if len(found) != len(names) or len(set(names)) != len(names):
        raise ValueError(f"names must be {len(found)} different ones, one a parameter of the optimizer, got {names}")
    return found


def _numbered(directory: Path) -> list[Path]:
    """The directory's checkpoints, lowest number first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NUMBERED.fullmatch(path.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.stem)


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 in hex; the tensors are contiguous and on the CPU."""
    names = sorted(tensors)
    table = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([text, table]).encode())
    for name in names:  # the table fixes every length, so the bytes need no separators
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_parameters(energy: nn.Module, tensors: dict[str, Tensor], where) -> None:
    try:
        energy.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        message = f"{where}: the checkpoint does not fit the settings' network ({reason})"
        raise CheckpointError(message) from None
