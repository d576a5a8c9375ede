"""The shards of a checkpoint too large for one file: which tensors go where, and which files belong together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_SHARD = re.compile(r"(\d{8,})-\d+-[0-9a-f]{8}\.safetensors")
#: Bytes of tensors in a file, which leaves a megabyte of the 16 for its header.
LARGEST = 15_000_000


def parts(tensors: dict[str, Tensor], largest: int) -> list[dict[str, Tensor]]:
    """The tensors by file, of at most ``largest`` bytes each, unless a single row of a tensor has more.

    What is larger than a file is cut into pieces of which no two fit into one, so that a name stands in a file once."""
    found, held = [dict[str, Tensor]()], 0
    for name, tensor in tensors.items():
        pieces: Sequence[Tensor] = [tensor]
        if tensor.nbytes > largest and tensor.dim():
            pieces = tensor.split(max(1, largest // (tensor.nbytes // len(tensor))))
        for piece in pieces:
            if found[-1] and held + piece.nbytes > largest:
                found.append({})
                held = 0
            found[-1][name] = piece
            held += piece.nbytes
    return found


def joined(found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of `parts`. Raises RuntimeError or TypeError where pieces of a name do not go together."""
    pieces: dict[str, list[Tensor]] = {}
    for part in found:
        for name, tensor in part.items():
            pieces.setdefault(name, []).append(tensor)
    return {name: of[0] if len(of) == 1 else torch.cat(of) for name, of in pieces.items()}


def paths(checkpoint: Path, digest: str, count: int) -> list[Path]:
    """Where so many shards of a checkpoint go: under names that no other content of that checkpoint has."""
    return [checkpoint.with_name(f"{checkpoint.stem}-{i}-{digest[:8]}.safetensors") for i in range(1, count + 1)]


def delete_alone(directory: Path, written: Path | None = None, beside: Sequence[Path] = ()) -> None:
    """Delete the shards of checkpoints that are no more, or were never whole, and of the checkpoint ``written`` all but
    those ``beside`` it: they are what had its number before."""
    for path in directory.iterdir():
        match = _SHARD.fullmatch(path.name)
        if match is None:
            continue
        whole = path.with_name(f"{match[1]}.safetensors")
        if path not in beside if whole == written else not whole.exists():
            path.unlink(missing_ok=True)
