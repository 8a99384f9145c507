"""Many samples, shared out: plan shards, run them on one or many workers, write each one, go on where it stopped."""

from .engines import ENGINES, run
from .folder import Folder
from .task import Results, Shard, Task, plan

__all__ = ["ENGINES", "Folder", "Results", "Shard", "Task", "plan", "run"]
