"""What discovery cannot find out about a family of models, one short file a family."""

from . import basic, flux, uvit

__all__ = ["basic", "flux", "uvit"]
