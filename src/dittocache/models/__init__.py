"""What discovery cannot find out about a family of models, one short file a family."""

from . import basic, flux, unet, uvit

__all__ = ["basic", "flux", "unet", "uvit"]
