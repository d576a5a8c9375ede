"""What a model learns from, by name."""

from .completion import Completions
from .densities import Density
from .images import Images
from .registry import NAMES, box_of, load

__all__ = ["NAMES", "Completions", "Density", "Images", "box_of", "load"]
