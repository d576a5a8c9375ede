"""The settings of a run: one frozen dataclass, which is the command line, the config file and config.json at once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args, get_type_hints

from .defaults import IMAGES, PLANES


def setting(default: Any, help: str) -> Any:
    """A field of Settings with the line that --help shows for it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a training run is. A field that is None takes the data set's default; config.json holds them resolved."""

    data: str = setting(
        "rings",
        f"Data set: {', '.join(PLANES)} (2-D); {', '.join(IMAGES)}; or package.module:function, which returns data of "
        "your own.",
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

    classes: bool = setting(
        False,
        "An energy for each class of labelled images: U(x, y). Each chain has a class, and the energies classify.",
    )
    class_weight: float = setting(
        0.1,
        "Weight of the classifier's cross-entropy in the loss, with --classes; 0 for none. A larger one classifies "
        "better, and the samples of a class become more alike.",
    )

    energy: str | None = setting(
        None,
        "Energy network: mlp for vectors, convnet (five layers) or unet (slower, and finer) for images; or "
        "package.module:function, which returns an nn.Module of your own, (B, ...) to (B,), and is given the data's "
        "shape if it takes an argument.",
    )
    activation: Literal["leaky-relu", "silu"] | None = setting(
        None,
        "Activation of the convnet: leaky-relu, as in the papers, or silu, whose score is smooth: matching needs that.",
    )
    width: int | None = setting(None, "Units of a hidden layer (mlp), or channels of the first layer (convnet, unet).")
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

    temperature: float = setting(
        1.0,
        "Temperature T of the model exp(-U / T), U the network's energy. An exact sampler, which has no noise scale, "
        "needs it for the cold chains of images: T is then what the square of --noise-scale is for the others.",
    )

    sampler: (
        Literal["anila", "anila-mh", "langevin", "mala", "tamed", "hmc", "gd", "anila-coded", "shrunk-noise"] | None
    ) = setting(
        None,
        "Sampler of the chains: anila (anisotropic), langevin (plain), tamed (clipped drift, plain noise), gd "
        "(gradient descent); exact by a Metropolis correction: anila-mh, mala, hmc. To compare only: anila-coded (the "
        "authors' code), shrunk-noise (AniLA's noise, plain drift).",
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
    replicas: int = setting(
        1,
        "Temperatures at which an exact sampler's chains run side by side and trade places, so that the cold ones, "
        "which alone teach, cross between modes. Each makes as many gradients as all chains did without.",
    )
    highest: float = setting(20.0, "Temperature of the hottest replica; the others lie between it and 1.")
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
    init: Literal["persistent", "data", "noise", "vae", "weighted"] | None = setting(
        None,
        "Where an update's chains start: where they were left (persistent: PCD), at data (data: CD), in uniform noise "
        "(noise: short-run), at the proposals of a VAE that learns from the chains (vae), or where they were left and "
        "with weights that follow each change of the energy (weighted: Jarzynski). Default persistent; of completion "
        "vae.",
    )
    witnesses: int | None = setting(
        None,
        "Chains beside those of init=weighted that the gradient never sees, moved and weighted alike: they measure log "
        "Z, and so the model's likelihood while it learns. A multiple of 16; 0 for none. Default as many as "
        "--batch-size, rounded up.",
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
    lr: float | None = setting(None, "Learning rate of the energy's Adam at the start; after a warm-up by matching.")
    lr_decay: Literal["linear", "none"] = setting("linear", "Learning rate over the run: linear to zero, or constant.")
    matching: int | None = setting(
        None,
        "Updates at the start without chains, in which the energy learns by matching: its score is to lead from "
        "uniform noise to the data.",
    )
    matching_lr: float | None = setting(None, "Learning rate of Adam where the warm-up by matching begins.")
    matching_weight: float | None = setting(
        None, "Weight of the matching loss beside the likelihood's, once chains have taken over; 0 for none."
    )
    flips: bool | None = setting(None, "Mirror every other image of the data, left to right.")
    energy_l2: float | None = setting(None, "Weight of the mean squared energies in the loss.")
    data_noise: float | None = setting(None, "Standard deviation of Gaussian noise added to the data, units of data.")
    clip_grad: float | None = setting(None, "Largest norm of the parameters' gradient; 0 for no clipping.")
    ema: float | None = setting(
        None,
        "Decay per update of the parameters' moving average, which sampling and evaluation use; 0 for none.",
    )

    on_divergence: Literal["stop", "rollback"] = setting(
        "stop",
        "Where an update is not finite: stop (exit code 3), or rollback to the last good checkpoint, with half the "
        "learning rates and a new seed; then also where the energies run away.",
    )
    rollbacks: int = setting(3, "Rollbacks of a run at most; then it stops.")

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


def names_of(setting: str) -> tuple[str, ...]:
    """The values that a setting chooses from."""
    return get_args(without_none(get_type_hints(Settings)[setting]))


def without_none(hint: Any) -> Any:
    """X of the hints X and X | None."""
    return get_args(hint)[0] if type(None) in get_args(hint) else hint
