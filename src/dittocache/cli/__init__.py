"""The command line: one command, verbs. Wrong arguments end with exit code 2 and one line."""

from . import calibrate, demo, eval, look, report, train, tune  # noqa: F401  (each registers its verbs)
from .base import app, main

__all__ = ["app", "main"]
