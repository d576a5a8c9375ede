"""What a model learns from, by name."""

from .completion import Completions
from .densities import Density
from .images import Images
from .registry import NAMES, box_of, load
from .samples import Vectors

__all__ = ["NAMES", "Completions", "Density", "Images", "Vectors", "box_of", "load"]
