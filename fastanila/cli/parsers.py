"""What the commands read from their command lines (train has its settings instead). Imports no torch, so that --help
does not wait for it."""

from __future__ import annotations

import argparse

from ..samplers import EXACT
from ..training import presets
from ..training.settings import names_of

SAMPLE_STARTS = ("chains", "noise", "vae")  #: where samples can start: `generate.STARTS`
_DEVICE = "auto (CUDA where there is one), cpu, cuda, cuda:1, ..."


def sample() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastanila.sample", description="Draw samples from a trained run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", help="run directory")
    parser.add_argument("--count", type=int, default=64, help="samples to draw, or images to complete")
    parser.add_argument("--out", default="samples.png", help="file to write: .png (a picture) or .npz (key samples)")
    parser.add_argument(
        "--steps", type=int,
        help="transitions; default: the run's K, and ten K from noise (also to inpaint); 0 with a VAE: its proposals",
    )  # fmt: skip
    parser.add_argument(
        "--start",
        choices=SAMPLE_STARTS,
        help="where the samples start; default: at the run's VAE if it has one, or chains",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--interpolate", action="store_true", help="proposals between latents, a row a pair (init=vae)")
    what.add_argument("--reconstruct", action="store_true", help="held-out data above their reconstructions (init=vae)")
    what.add_argument(
        "--inpaint", choices=names_of("mask"), help="fill a region of held-out images, all else held (images)"
    )
    parser.add_argument(
        "--classes", type=int, nargs="+", metavar="CLASS",
        help="classes to draw, counted from 0, a row each; default: all (of a run with classes)",
    )  # fmt: skip
    parser.add_argument("--completions", type=int, default=4, help="completions of each image")
    parser.add_argument("--data-dir", help="folder of the images, if they have moved since the run")
    parser.add_argument("--sampler", choices=names_of("sampler"), help="another sampler than the run's")
    parser.add_argument("--step-size", type=float, help="its step size; default: as the run's")
    parser.add_argument("--threshold", type=float, help="its threshold; default: as the run's")
    parser.add_argument("--norm", choices=names_of("norm"), help="its norm; default: as the run's")
    parser.add_argument("--leapfrog-steps", type=int, help="leapfrog steps of hmc")
    parser.add_argument(
        "--warm-up", type=int, default=0,
        help="transitions in which an exact sampler adapts its step size, and replicas their temperatures",
    )  # fmt: skip
    parser.add_argument(
        "--replicas", type=int, help="temperatures that trade places, of an exact sampler; default: as the run's"
    )
    parser.add_argument("--highest", type=float, help="temperature of the hottest replica; default: as the run's")
    parser.add_argument("--seed", type=int, default=0, help="names the noise")
    parser.add_argument("--device", default="auto", help=_DEVICE)
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True, help="compile the transition")
    return parser


def evaluate() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastanila.evaluate", description="Evaluate a trained run; prints one JSON object."
    )
    parser.add_argument("run", help="run directory")
    parser.add_argument("--data-dir", help="folder of the images, if they have moved since the run")
    parser.add_argument(
        "--ood", metavar="DATA",
        help="other images, to be told from the run's by their energy: digits, cifar10, flowers102 or a folder",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help=_DEVICE)
    parser.add_argument("--chains", action="store_true", help="how well the chains mix (needs the diagnostics extra)")
    parser.add_argument("--count", type=int, default=2000, help="images of each set at most (default: 2000)")
    parser.add_argument(
        "--descent", type=int, default=0,
        help="transitions without noise that the images make ahead of their comparison (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--fid", action="store_true", help="FID too, of images (needs the fid extra, and a network once)"
    )
    parser.add_argument("--draws", type=int, default=1000, help="transitions that --chains makes (default: 1000)")
    parser.add_argument(
        "--likelihood", action="store_true", help="log Z and the held-out data's NLL by annealing, with a bracket"
    )
    parser.add_argument(
        "--temperatures", type=int, default=1000, help="temperatures of --likelihood, each way (default: 1000)"
    )
    parser.add_argument(
        "--annealing-chains", type=int, default=256, help="chains of --likelihood, each way (default: 256)"
    )
    parser.add_argument(
        "--settle", type=int, default=1000,
        help="transitions from data to the model's law, ahead of the upper bound of --likelihood (default: 1000)",
    )  # fmt: skip
    parser.add_argument(
        "--annealing-sampler", choices=EXACT, help="sampler of --likelihood; default: the run's if exact, or mala"
    )
    parser.add_argument("--seed", type=int, default=0, help="names the noise of --chains and --likelihood")
    parser.add_argument(
        "--fused", action=argparse.BooleanOptionalAction, default=True, help="compile the transitions it makes"
    )
    return parser


def compare() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastanila.compare", description="Train with several samplers at equal gradients, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    known = list(dict.fromkeys((*names_of("sampler"), *presets.FORMS)))
    parser.add_argument(
        "--preset", choices=presets.names(),
        help="an experiment of the papers: its forms of the sampler, each tuned by the same rule, by several seeds",
    )  # fmt: skip
    parser.add_argument("--data", default="rings", help="data set; with a preset, in place of its own")
    parser.add_argument("--data-dir", help="folder that holds the images")
    parser.add_argument("--image-size", type=int, help="side of the images (image-folder, flowers102), pixels")
    parser.add_argument(
        "--samplers", nargs="+", choices=known, default=["langevin", "anila"],
        help="samplers; with a preset some of its forms, by default all",
    )  # fmt: skip
    parser.add_argument(
        "--thresholds", nargs="+", type=float, default=[], help="levels at which scores clip; default the data set's"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds; with a preset by default its own")
    parser.add_argument(
        "--iterations", type=int, help="updates, and of a preset's pilots at most so many; default the data set's"
    )
    parser.add_argument(
        "--step-size", type=float, help="step size of every sampler; default each one's for the data set"
    )
    parser.add_argument(
        "--replicas", type=int, default=1,
        help="temperatures at which the exact samplers' chains trade places, with as many gradients in all",
    )  # fmt: skip
    parser.add_argument("--highest", type=float, help="temperature of the hottest replica; default train's")
    parser.add_argument(
        "--pilots", type=int, help="with a preset: updates of a pilot, 0 to tune nothing; default the preset's own"
    )
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="NAME=VALUE",
        help="other settings of every run, as fastanila.train has them: chains=128 width=8",
    )  # fmt: skip
    parser.add_argument("--out", required=True, help="folder of the runs, compare.json and compare.png")
    parser.add_argument(
        "--fused", action=argparse.BooleanOptionalAction, default=True, help="compiled transitions with the fused step"
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, which share the processor's cores")
    return parser


def ergodicity() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastanila.ergodicity", description="A sampler's law and how fast it is reached, on a grid."
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--target", default="normal", metavar="NAME",
        help="density: normal (the default), skewed, logistic, double-well, gaussian, correlated, banana, or a 2-D "
        "data set whose density has a score",
    )  # fmt: skip
    target.add_argument("--run", help="run directory: the energy it learned, in two dimensions but for --coupling")
    target.add_argument("--table", action="store_true", help="print the table of biases, and nothing else")
    parser.add_argument("--parameter", type=float, nargs="+", help="of the named target; several make a family")
    parser.add_argument("--sampler", choices=names_of("sampler"), help="default: anila, or the run's own")
    parser.add_argument("--threshold", type=float, nargs="+", help="the sampler's b; several make a family")
    parser.add_argument("--step-size", type=float, nargs="+", help="the sampler's eps; several make a family")
    parser.add_argument("--norm", choices=names_of("norm"), help="whose magnitude |s| is")
    parser.add_argument("--resolution", type=int, help="cells along an axis (default 800, or 48 in two dimensions)")
    parser.add_argument("--box", type=float, nargs=2, metavar=("LOW", "HIGH"), help="box along every axis")
    parser.add_argument("--beta", type=float, default=0.25, help="of V = pi^-beta (default 0.25)")
    parser.add_argument("--radius", type=float, help="of the ball; default: it holds 95 %% of every target, or more")
    parser.add_argument("--out", help="directory for ergodicity.json and ergodicity.png, or coupling.json and .png")
    parser.add_argument(
        "--coupling", action="store_true",
        help="pairs of chains that meet, in place of a grid, in any dimension: bounds the total variation to the law",
    )  # fmt: skip
    parser.add_argument("--pairs", type=int, default=256, help="how many, of --coupling (default: 256)")
    parser.add_argument("--lag", type=int, help="transitions that one of a pair is ahead; default: found by 64 pairs")
    parser.add_argument("--budget", type=int, default=2000, help="transitions in which pairs may meet (default: 2000)")
    parser.add_argument(
        "--warm-up", type=int, default=0, help="transitions in which --coupling's sampler adapts its step size first"
    )
    parser.add_argument(
        "--gradient", type=int, default=0, metavar="PAIRS",
        help="of a run: cost and variance of an unbiased gradient in its parameters, by so many pairs that meet",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="names the noise of --coupling")
    return parser
