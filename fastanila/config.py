"""The settings of a run: one frozen dataclass, which is the command line, the config file and config.json at once."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


def setting(default: Any, help: str) -> Any:
    """A field of Settings with the line that --help shows for it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a training run is. A field that is None takes the data set's default; config.json holds them resolved."""

    data: str = setting(
        "rings",
        "Data set: rings, 8gaussians, 25gaussians, pinwheel, two-moons, swiss-roll, checkerboard (2-D); "
        "digits, image-folder, cifar10, flowers102.",
    )
    data_dir: str | None = setting(None, "Folder that holds the images (image-folder, cifar10, flowers102).")
    download: bool = setting(False, "Fetch cifar10 or flowers102 into --data-dir if they are missing.")
    image_size: int = setting(32, "Side to which images are resized and cropped (image-folder, flowers102), pixels.")
    channels: int = setting(3, "Channels of an image-folder: 3 for RGB, 1 for grey.")

    task: Literal["generation", "completion"] = setting(
        "generation", "generation: p(x); completion: p(x | the known pixels) of images with a region missing (--mask)."
    )
    mask: Literal["centre", "half", "blocks"] = setting(
        "centre", "What completion misses: the middle square, the right half, or eight random squares of sixteen."
    )

    energy: Literal["mlp", "convnet"] | None = setting(
        None, "Energy network: mlp for vectors, convnet (five layers) for images."
    )
    width: int | None = setting(None, "Units of a hidden layer (mlp), or channels of the first layer (convnet).")
    depth: int | None = setting(None, "Hidden layers (mlp).")
    features: int | None = setting(None, "Random Fourier features ahead of the network (mlp); 0 for none.")
    feature_scale: float | None = setting(
        None, "Standard deviation of the Fourier features' frequencies, 1 / unit of data."
    )
    confinement: float | None = setting(None, "c of the energy's term c/2 |x|^2, 1 / squared unit of data.")
    reference_sd: float = setting(
        math.inf,
        "Standard deviation of a Gaussian that the energy is relative to: adds |x|^2 / (2 sd^2) to it; inf for none.",
    )

    sampler: Literal["anila", "anila-mh", "langevin", "mala", "tamed", "hmc", "gd"] | None = setting(
        None,
        "Sampler of the chains: anila (anisotropic), langevin (plain), tamed (clipped drift, plain noise), gd "
        "(gradient descent); exact by a Metropolis correction: anila-mh, mala, hmc.",
    )
    threshold: float | None = setting(
        None,
        "AniLA's b, 1 / unit of data: a score beyond it is clipped and its noise shrunk; inf is plain "
        "Langevin. Without a correction the sampler's bias grows with the fraction clipped: watch clip_fraction, and "
        "keep it near a tenth or below. Of tamed: b without unit, in halves of the noise's standard deviation.",
    )
    step_size: float | None = setting(
        None, "Step size eps, squared units of data; of hmc the square of its leapfrog step."
    )
    leapfrog_steps: int = setting(10, "Leapfrog steps, each with a gradient, of one transition of hmc.")
    noise_scale: float | None = setting(
        None, "Langevin noise scale sigma; below 1 the chains run at the temperature sigma^2. Exact samplers have none."
    )
    norm: Literal["element", "channel", "chain"] = setting(
        "element", "Whose magnitude the threshold bounds: each element, a pixel's channels, the whole chain."
    )
    refresh: Literal["transition", "update"] = setting(
        "transition",
        "When AniLA's gain is taken: from every transition's score, or once, where an update's chains start.",
    )
    clamp: bool | None = setting(None, "Clamp the chains to the data's box at every transition.")

    steps: int | None = setting(None, "Transitions a chain makes for one update (K).")
    chains: int | None = setting(None, "Persistent chains, a multiple of --batch-size; otherwise equal to it.")
    batch_size: int | None = setting(None, "Data, and chains, that one update sees.")
    init: Literal["persistent", "data", "noise", "vae"] | None = setting(
        None,
        "Where an update's chains start: where they were left (persistent: PCD), at data (data: CD), in uniform noise "
        "(noise: short-run), or at the proposals of a VAE that learns from the chains (vae). Default persistent; of "
        "completion vae.",
    )
    reinit: float | None = setting(
        None, "Probability that a persistent chain restarts from noise in an update it takes part in."
    )

    latent: int | None = setting(None, "Latents of the VAE.")
    vae_width: int | None = setting(None, "Units of a hidden layer of the VAE, or channels of its first layer.")
    kl_weight: float | None = setting(
        None,
        "Weight of KL in the VAE's loss beside half the squared error of the reconstruction: the variance of the "
        "decoder's own noise, squared units of data.",
    )
    vae_warm_up: int | None = setting(
        None,
        "Updates at the start in which the VAE learns from data, with a weight of KL that falls from ten times its "
        "own, and the energy stands still, while its learning rate decays. Default a quarter of all.",
    )
    vae_lr: float | None = setting(None, "Learning rate of the VAE's Adam at the start.")
    vae_lr_decay: Literal["linear", "none"] = setting("linear", "The VAE's learning rate over the run, as --lr-decay.")

    iterations: int | None = setting(None, "Updates of the parameters.")
    lr: float | None = setting(None, "Learning rate of the energy's Adam at the start.")
    lr_decay: Literal["linear", "none"] = setting("linear", "Learning rate over the run: linear to zero, or constant.")
    energy_l2: float | None = setting(None, "Weight of the mean squared energies in the loss.")
    data_noise: float | None = setting(None, "Standard deviation of Gaussian noise added to the data, units of data.")
    clip_grad: float | None = setting(None, "Largest norm of the parameters' gradient; 0 for no clipping.")
    ema: float | None = setting(
        None,
        "Decay per update of the parameters' moving average, which sampling and evaluation use; 0 for none.",
    )

    seed: int = setting(0, "Names every random number of the run.")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is one.")
    precision: Literal["float32", "tf32", "bf16"] = setting(
        "float32", "Arithmetic of the energy network: float32, tf32 (CUDA matrix products), bf16 (autocast)."
    )
    fused: bool = setting(
        True,
        "Compiled transitions with the fused step; --no-fused runs the plain definition, eagerly, with the same noise.",
    )
    out: str | None = setting(None, "Run directory; default runs/DATA, or the first free runs/DATA-2, -3, ...")
    log_every: int | None = setting(None, "Updates between lines of metrics.jsonl.")
    sample_every: int | None = setting(
        None, "Updates between sample pictures, and exact likelihoods of 2-D data; 0 for none."
    )
    save_every: int | None = setting(None, "Updates between checkpoints.")
    tensorboard: bool = setting(False, "Also write TensorBoard event files (needs the tensorboard extra).")


# Threshold and step size are those of sampler="anila", which `defaults` translates for the others.

# 2-D: an exact sampler, because a model makes up for the bias of others by being too sharp (README, the numbers).
# For anila, threshold 10 leaves about 7 % of the elements clipped at the end. At 5 it was half of them: the bias then
# grows as the model sharpens, and training ended 0.29 nats off in one setting and diverged in another.
_PLANE: dict[str, Any] = dict(
    sampler="anila-mh",
    energy="mlp", width=64, depth=2, features=64, feature_scale=1.5, confinement=0.5,
    threshold=10.0, step_size=0.005, noise_scale=1.0, clamp=False,
    steps=60, chains=512, batch_size=512, reinit=0.005,
    iterations=4000, lr=5e-4, energy_l2=0.0, data_noise=0.0, clip_grad=0.0, ema=0.995,
    latent=2, vae_width=128, kl_weight=0.1, vae_lr=3e-3,
    log_every=20, sample_every=500, save_every=1000,
)  # fmt: skip

#: A step of which nine in ten are accepted; without the correction its bias would be large, and training may diverge.
#: It is four times as long, so that fewer of them do: 40 learn rings as well as 60.
_EXACT_PLANE: dict[str, Any] = dict(step_size=0.02, steps=40)

#: Proposals give modes and rings somewhat wrong shares, which chains cannot put right where they do not cross from one
#: to another: an energy that is not held near zero then tilts without end.
_AMORTIZED_PLANE: dict[str, Any] = dict(energy_l2=0.1)

# Images: energies of order one, so chains at a low temperature (noise_scale^2), as all deep image EBMs have it: a
# transition adds noise of 0.01 to a pixel in [-1, 1] and moves it by at most step_size threshold / 2.
_IMAGES: dict[str, Any] = dict(
    sampler="anila",
    energy="convnet", width=32, depth=0, features=0, feature_scale=0.0, confinement=0.0,
    threshold=0.02, step_size=4.0, noise_scale=0.005, clamp=True,
    steps=30, chains=256, batch_size=64, reinit=0.02,
    iterations=2000, lr=1e-4, energy_l2=0.0, data_noise=0.03, clip_grad=0.0, ema=0.99,
    latent=64, vae_width=32, kl_weight=0.1, vae_lr=1e-3,
    log_every=10, sample_every=100, save_every=100,
)  # fmt: skip

_DIGITS = _IMAGES | dict(threshold=0.05, step_size=1.0, noise_scale=0.01, steps=40, chains=1024, iterations=1000)

#: What is known leaves little open: a decoder with as much noise as that of whole images would ignore its latents.
_COMPLETION: dict[str, Any] = dict(kl_weight=0.01)

PLANES = ("rings", "8gaussians", "25gaussians", "pinwheel", "two-moons", "swiss-roll", "checkerboard")
IMAGES = ("digits", "image-folder", "cifar10", "flowers102")

DEFAULTS: dict[str, dict[str, Any]] = {
    **{name: _PLANE for name in PLANES},
    **{name: _IMAGES for name in IMAGES},
    "digits": _DIGITS,
}

#: Samplers with a Metropolis correction.
EXACT = ("anila-mh", "mala", "hmc")

#: What may differ when a run is resumed. Of these only iterations changes numbers: it stretches a linear lr decay.
RESUMABLE = frozenset(
    {"data_dir", "download", "iterations", "device", "fused", "log_every", "sample_every", "save_every", "tensorboard"}
)  # fmt: skip


def defaults(name: str, sampler: str | None = None, init: str | None = None, task: str | None = None) -> dict[str, Any]:
    """The data set's defaults, for that sampler, chain start and task; {} if there is no such set.

    Less the number of chains, which follows batch size and init.
    """
    own = {k: v for k, v in DEFAULTS.get(name, {}).items() if k != "chains"}
    if not own:
        return own
    own["sampler"] = sampler or own["sampler"]
    own |= translated(own, "anila", own["sampler"])
    if name in PLANES:
        own |= (_EXACT_PLANE if own["sampler"] in EXACT else {}) | (_AMORTIZED_PLANE if init == "vae" else {})
    return own | (_COMPLETION if task == "completion" else {})


def translated(values: Mapping[str, Any], before: str, after: str, step_size: float | None = None) -> dict[str, Any]:
    """threshold, step_size, noise_scale and clamp of one sampler as those of another that moves alike.

    Exact samplers have no noise scale sigma: U at temperature sigma**2 with step eps and threshold b is U / sigma**2
    with eps sigma**2 and b / sigma**2. The tamed sampler's threshold is in units of its step's noise. ``step_size``:
    what the other is to have instead. Raises ValueError for an exact sampler of a law of temperature 0.
    """
    threshold, length, noise_scale, clamp = (values[k] for k in ("threshold", "step_size", "noise_scale", "clamp"))
    if before == "tamed":
        threshold /= math.sqrt(length)
    if after in EXACT:
        heat = noise_scale**2
        if not heat:
            raise ValueError(f"noise_scale must be positive for sampler={after}, got {noise_scale}")
        threshold, length, noise_scale, clamp = threshold / heat, length * heat, 1.0, False
    length = length if step_size is None else step_size
    if after == "tamed":
        threshold *= math.sqrt(length)
    return dict(threshold=threshold, step_size=length, noise_scale=noise_scale, clamp=clamp)


def resolve(settings: Settings) -> Settings:
    """The settings with every default of the data set and the task filled in, checked.

    Raises ValueError naming the setting.
    """
    if settings.data not in DEFAULTS:
        raise ValueError(f"data must be one of {', '.join(DEFAULTS)}, got {settings.data!r}")
    written = {name: value for name in ("data_dir", "out") if isinstance(value := getattr(settings, name), str)}
    settings = dataclasses.replace(settings, **{name: str(path_of(name, value)) for name, value in written.items()})
    if settings.init is None:
        settings = dataclasses.replace(settings, init="vae" if settings.task == "completion" else "persistent")
    own = defaults(settings.data, settings.sampler, settings.init, settings.task)
    settings = dataclasses.replace(settings, **{k: v for k, v in own.items() if getattr(settings, k) is None})
    if settings.vae_warm_up is None:
        warm_up = settings.iterations // 4 if settings.init == "vae" else 0
        settings = dataclasses.replace(settings, vae_warm_up=warm_up)
    if settings.chains is None:
        batches = DEFAULTS[settings.data]["chains"] // settings.batch_size if settings.init == "persistent" else 1
        settings = dataclasses.replace(settings, chains=max(1, batches) * settings.batch_size)
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Raise ValueError naming the first setting that cannot be, what it was and what was expected."""
    from . import checks  # imports torch, for which --help need not wait

    for name, hint in get_type_hints(Settings).items():
        _check_type(name, getattr(settings, name), hint)
    for name in (
        "image_size",
        "channels",
        "width",
        "latent",
        "vae_width",
        "steps",
        "leapfrog_steps",
        "batch_size",
        "iterations",
    ):
        checks.count(name, getattr(settings, name))
    for name in ("log_every", "save_every"):
        checks.count(name, getattr(settings, name))
    checks.count("chains", settings.chains)
    for name in ("depth", "features", "sample_every", "vae_warm_up", "seed"):
        checks.count(name, getattr(settings, name), least=0)
    if settings.seed >= 1 << 63:
        raise ValueError(f"seed must be below 2**63, got {settings.seed}")
    for name in ("threshold", "reference_sd"):
        checks.positive(name, getattr(settings, name))
    for name in ("step_size", "lr", "vae_lr"):
        checks.positive(name, getattr(settings, name), finite=True)
    for name in ("noise_scale", "confinement", "feature_scale", "energy_l2", "kl_weight", "data_noise", "clip_grad"):
        checks.nonnegative(name, getattr(settings, name))
    for name in ("reinit", "ema"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {getattr(settings, name)}")
    if settings.sampler in EXACT:
        _check_exact(settings)
    persistent = settings.init == "persistent"
    if settings.chains % settings.batch_size or not (persistent or settings.chains == settings.batch_size):
        wanted = "a multiple of" if persistent else f"with init={settings.init} equal to"
        raise ValueError(f"chains must be {wanted} batch_size ({settings.batch_size}), got {settings.chains}")
    if (settings.energy == "convnet") != (settings.data in IMAGES):
        wanted = DEFAULTS[settings.data]["energy"]
        raise ValueError(f"energy must be {wanted} for {settings.data}, got {settings.energy}")
    if settings.init == "vae" and settings.vae_warm_up >= settings.iterations:
        wanted = f"below iterations ({settings.iterations}), or the energy never learns"
        raise ValueError(f"vae_warm_up must be {wanted}, got {settings.vae_warm_up}")
    if settings.task == "completion":
        if settings.data not in IMAGES:
            raise ValueError(f"data must be images with task=completion ({', '.join(IMAGES)}), got {settings.data}")
        if settings.init != "vae":
            raise ValueError(f"init must be vae with task=completion, got {settings.init}")


def _check_exact(settings: Settings) -> None:
    from .adjusted import REFUSALS

    refused = (("noise_scale", "noise_scale", 1.0), ("clamp", "bounds", False), ("refresh", "refresh", "transition"))
    for name, why, needed in refused:
        got = getattr(settings, name)
        if got != needed:
            raise ValueError(f"{name} must be {needed} with sampler={settings.sampler}, got {got}: {REFUSALS[why]}")


def names_of(setting: str) -> tuple[str, ...]:
    """The values that a setting chooses from."""
    return get_args(without_none(get_type_hints(Settings)[setting]))


def without_none(hint: Any) -> Any:
    """X of the hints X and X | None."""
    return get_args(hint)[0] if type(None) in get_args(hint) else hint


def _check_type(name: str, value: Any, hint: Any) -> None:
    kind = without_none(hint)
    if value is None and kind is not hint:
        return
    if get_origin(kind) is Literal:
        fits, wanted = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
    elif kind is float:
        fits, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        wanted = {bool: "true or false", int: "an integer", str: "a string"}[kind]
    if not fits:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def path_of(name: str, written: str | Path) -> Path:
    """A path as people write it: ~ and ~user are home folders, also where no shell has put them in.

    Raises ValueError naming the setting where it is empty, or there is no such home folder.
    """
    if not os.fspath(written):
        raise ValueError(f"{name} must be a path, got ''")
    text = os.path.expanduser(os.fspath(written))
    if isinstance(written, str) and text.startswith("~"):
        raise ValueError(f"{name}: there is no such home folder, got {written!r}; a name that begins with ~ is ./~...")
    path = Path(text)
    return path.absolute() if str(path).startswith("~") else path  # ./~x, which pathlib shortens to ~x


def read(path: str | Path) -> dict[str, Any]:
    """The settings of a TOML config file, or of a run's config.json, as a dict.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong in it: unreadable, an unknown key, or a
    setting that it has twice.
    """
    path = path_of("config", path)
    if not path.is_file():
        raise FileNotFoundError(f"config: no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=lambda pairs: _by_name(pairs, path))
        else:
            values = tomllib.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"config {path} cannot be read: {error}") from None
    hints = get_type_hints(Settings)
    if not isinstance(values, dict):
        raise ValueError(f"config {path} must hold settings by name, got a {type(values).__name__}")
    values = _by_name(values.items(), path)
    for key in values:
        if key not in hints:
            raise ValueError(f"config {path} has an unknown key {key!r}; known are {', '.join(sorted(hints))}")
        values[key] = float("inf") if values[key] == "inf" else values[key]
        _check_type(key, values[key], hints[key])
    return values


def _by_name(pairs: Iterable[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """The settings of a file, whose names it may write with - for _. Raises ValueError where it has one twice."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        name = key.replace("-", "_")
        if name in values:
            raise ValueError(f"config {path} has {name} twice: {values[name]!r} and {value!r}")
        values[name] = value
    return values


def is_of_a_run(path: str | Path) -> bool:
    """Whether a config file is the config.json of a run, in the run's folder."""
    path = path_of("config", path)
    return path.name == "config.json" and (path.parent / "checkpoints").is_dir()


def dump(settings: Settings) -> str:
    """config.json. An infinite threshold is the string "inf", because JSON has no infinity."""
    values = {k: "inf" if v == float("inf") else v for k, v in dataclasses.asdict(settings).items()}
    return json.dumps(values, indent=2) + "\n"
