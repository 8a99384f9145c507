"""What is corrected outside the network?"""

from .base import Fix, Level
from .noise_scale import NoiseScale

__all__ = ["Fix", "Level", "NoiseScale"]
