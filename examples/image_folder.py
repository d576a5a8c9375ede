"""A folder of images, by a data set of your own: train, sample, and look. Without --folder it draws some images."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastanila import generate
from fastanila.evaluation import plots
from fastanila.training.loop import train
from fastanila.training.run import box_of
from fastanila.training.settings import Settings


class Folder:
    """Indexable, as torchvision's data sets are: [i] is a Pillow image of 16 x 16 pixels."""

    def __init__(self, root):
        self.paths = sorted(path for path in Path(root).rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return Image.open(self.paths[i]).convert("RGB").resize((16, 16))


def draw_some(root, count):
    """Discs of some colours at some places."""
    random = np.random.default_rng(0)
    for i in range(count):
        image, (x, y, r) = Image.new("RGB", (16, 16), (20, 20, 40)), random.uniform((5, 5, 3), (11, 11, 5))
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=tuple(random.integers(90, 256, 3).tolist()))
        image.save(Path(root) / f"{i:04d}.png")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--folder", help="folder of images")
parser.add_argument("--iterations", type=int, default=300)
parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True)
parser.add_argument("--run", help="run directory; default a new one in runs/")
parser.add_argument("--out", default="image_folder.png", help="picture to write")
arguments = parser.parse_args()

with tempfile.TemporaryDirectory() as drawn:
    if arguments.folder is None:
        draw_some(drawn, 500)
    settings = Settings(iterations=arguments.iterations, width=8, fused=arguments.fused, out=arguments.run)
    run = train(settings, data=Folder(arguments.folder or drawn))  # read whole, once
samples = generate.sample(run, 64, fused=arguments.fused)  # where the chains went on to
plots.save_images(arguments.out, samples, box_of(run))
print(f"the picture is in {arguments.out}")
