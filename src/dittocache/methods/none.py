"""No caching."""

from ..recipe import Recipe, method
from ..when import Every


@method(name="none", title="No caching", arxiv="", bibtex="")
def none() -> Recipe:
    """Every step is computed in full: the reference, with the runtime on."""
    return Recipe(when=Every(1))
