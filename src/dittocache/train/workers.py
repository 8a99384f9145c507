"""The processes that train together: one, or those that accelerate's launcher or torchrun started."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor


class Workers:
    """This process among all. With more than one, gradients are summed through accelerate.

    Raises:
        ImportError: several processes were started, but accelerate is not installed.
    """

    def __init__(self) -> None:
        self.accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import Accelerator
            except ImportError:
                message = "training in several processes needs accelerate: pip install 'dittocache[train]'"
                raise ImportError(message) from None
            self.accelerator = Accelerator()

    @property
    def rank(self) -> int:
        return 0 if self.accelerator is None else int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    @property
    def device(self) -> Any:
        """The device of this process; None if there is only one process, which stays where its model is."""
        return None if self.accelerator is None else self.accelerator.device

    def total(self, x: Tensor) -> Tensor:
        """Sum over all processes, the same in each."""
        return x if self.accelerator is None else self.accelerator.reduce(x, "sum")

    def wait(self) -> None:
        """Until all have come here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
