"""What discovery cannot find out about a family of models, one short file a family."""

from . import basic, flux

__all__ = ["basic", "flux"]
