"""Rows x samples as work that can be shared out: `dittocache eval`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .. import bundled
from ..calibrate.setup import check_uncached
from ..parts import check_choice, check_int
from ..work import Folder, Results, Shard
from . import features, pipelines
from .comparison import Comparison
from .measure import Instruments, measure
from .provenance import command, provenance, versions
from .rows import Row, own_guidance, run_row, run_rows, scheduler_class
from .steps import FEW, alike, step_errors
from .summary import summarise

PAIRED = ("psnr", "ssim", "latent-error")  # measures of pairs; the first and the last cost nothing
SETS = ("fd", "precision-recall")  # distances between sets, in the space of features
JUDGED = ("accuracy",)  # what only a classifier of the model's own classes can tell
SCORES = tuple(name for name, kind in features.METRICS.items() if issubclass(kind, features.Score))
METRICS = (*PAIRED, *SETS, *JUDGED, *SCORES)
SPACES = tuple(name for name in features.METRICS if name not in SCORES)
MANY = 10_000  # more than any bundled model knows
LONGEST = 1000  # conditions that a configuration spells out
ADM_KEPT = ("features", "spatial", "probabilities")


class Asked(NamedTuple):
    """What is asked of a model, in turn: one of each for every condition.

    Attributes:
        conditions: class labels or prompts.
        names: how they are written.
        classes: what the model's judge should read; None if it has none.
    """

    conditions: tuple[Any, ...]
    names: tuple[str, ...]
    classes: tuple[int, ...] | None = None


def asked_of(model: str) -> Asked:
    """All that a bundled model, or a class-conditional one, can be asked, in an order whose first few lie far apart.

    Raises:
        ValueError: it draws from prompts, which must be given.
    """
    if model in bundled.names():
        known = len({*bundled.questions(model, MANY).names})
        everything = bundled.questions(model, known)
        conditions, names, read = (tuple(one[j] for j in _spread(known)) for one in everything)
        return Asked(conditions, tuple(map(str, names)), tuple(map(int, read)))
    count = pipelines.classes(model)
    if not count:
        raise ValueError(f"{model} draws from prompts: give some")
    return Asked(tuple(_spread(count)), tuple(map(str, _spread(count))))


def _spread(count: int) -> list[int]:
    """All numbers below `count`, each far from the one before: multiples of about the golden section."""
    stride = next(n for n in range(max(1, round(0.618 * count)), count + 1) if math.gcd(n, count) == 1)
    return [j * stride % count for j in range(count)]


@dataclass
class Evaluation:
    """Draws samples in several ways and measures them: a `Task`.

    Sample j has condition j modulo their number and the seed `seed + j`. Samples of a shard are one batch. All rows of
    a shard run in turn in one worker, in an order that rotates from shard to shard, so their times can be compared.

    Args:
        model: a bundled model, a folder, or a name on the Hugging Face Hub.
        rows: the first is the reference, and is not cached.
        conditions: class labels or prompts.
        seed: of sample 0.
        guidance_scale: strength of guidance; None for the pipeline's own.
        batch: samples of a shard.
        metrics: of METRICS.
        space: of SPACES: where distances between sets are taken.
        weights: where the weights of learned metrics are, by name.
        adm: keep what the protocol for ImageNet needs; see `evaluate.adm`.
        device, dtype: where and in what precision the model computes.
        threads: of every worker on a CPU.

    Raises:
        ValueError: a value out of range, an unknown metric, or one whose weights are missing.
    """

    model: str
    rows: tuple[Row, ...]
    conditions: tuple[Any, ...]
    seed: int = 0
    guidance_scale: float | None = None
    batch: int = 8
    metrics: tuple[str, ...] = PAIRED
    space: str = "judge"
    weights: Mapping[str, str] = field(default_factory=dict)
    adm: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.rows or self.rows[0].recipe is not None:
            raise ValueError("the first row is the reference and has no recipe")
        labels = [row.label for row in self.rows]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"every row needs a label of its own; {twice!r} occurs twice")
        for row in self.rows:
            if row.scheduler is not None:
                scheduler_class(row.scheduler)
        if not self.conditions:
            raise ValueError("there is nothing to draw: give one condition or more")
        for name in self.metrics:
            check_choice("metric", name, METRICS)
        check_choice("space", self.space, SPACES)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        check_int("seed", self.seed, 0)
        check_int("batch", self.batch, 1)
        check_int("threads", self.threads, 1)
        if "accuracy" in self.metrics and self.space != "judge":
            raise ValueError(f"accuracy is what a judge reads; the space is {self.space!r}")
        features.check(self._needed(), self._weights())

    @property
    def looks(self) -> bool:
        """Whether features are wanted."""
        return self.adm or bool({*SETS, *JUDGED} & {*self.metrics})

    def _needed(self) -> list[str]:
        """Learned metrics."""
        return [name for name in SCORES if name in self.metrics] + [self.space] * self.looks

    def _weights(self) -> dict[str, str]:
        judge = {"judge": self.model} if self.model in bundled.names() else {}
        return {**judge, **self.weights}

    # ---- the task ---------------------------------------------------------------------------------------------------
    def config(self) -> dict[str, Any]:
        named = {name: self._weights().get(name, features.METRICS[name].default) for name in self._needed()}
        found = {
            "task": "evaluation",
            "model": self.model,
            "fingerprint": pipelines.fingerprint(pipelines.locate(self.model)),
            "rows": [row.config() for row in self.rows],
            "conditions": _short(self.conditions),
            "metrics": sorted({*self.metrics, *PAIRED} - ({"ssim"} - {*self.metrics})),
            "weights": {
                name: pipelines.fingerprint(features.METRICS[name].find(place)) for name, place in named.items()
            },
            "device": torch.device(self.device).type,
        }
        if self.looks:
            found["space"] = self.space
        same = ("seed", "guidance_scale", "adm", "dtype", "threads")
        return found | {name: getattr(self, name) for name in same} | {"versions": versions()}

    def open(self) -> None:
        """Loads the pipeline and the metrics, and runs every row once, untimed."""
        torch.set_num_threads(self.threads)
        self.pipe = pipelines.load(self.model, self.device, getattr(torch, self.dtype))
        check_uncached(self.pipe)
        weights = self._weights()
        look: Any = features.load(self.space, weights, self.device) if self.looks else None
        scores: dict[str, Any] = {
            name: features.load(name, weights, self.device) for name in SCORES if name in self.metrics
        }
        kept = ADM_KEPT if self.adm else ("features",)
        self.instruments = Instruments("ssim" in self.metrics, look, kept, scores)
        for row in self.rows:
            run_row(self.pipe, row, [self.condition(0)], [self.seed], self.guidance_scale)

    def run(self, samples: Sequence[int]) -> Results:
        asked, seeds = [self.condition(j) for j in samples], [self.seed + j for j in samples]
        turn = samples[0] // self.batch
        runs = run_rows(self.pipe, self.rows, asked, seeds, self.guidance_scale, turn)
        facts = {"step_errors": self._step_errors(asked[:FEW], seeds[:FEW])} if 0 in samples else {}
        found = measure(self.rows, runs, samples, asked, self.instruments, facts)
        guidance = self.guidance_scale if self.guidance_scale is not None else own_guidance(self.pipe)
        made = provenance(self.pipe, self.model, self.rows[0].steps, guidance, self.batch)
        timing = {**found.timing, "host": platform.node(), "process": os.getpid(), "provenance": made}
        return Results(found.table, found.arrays, found.facts, timing)

    def condition(self, sample: int) -> Any:
        return self.conditions[sample % len(self.conditions)]

    def _step_errors(self, asked: Sequence[Any], seeds: Sequence[int]) -> dict[str, tuple[float, ...]]:
        """By label, of the rows whose steps can be compared with the reference's; each is drawn once more."""
        rows = [row for row in self.rows if alike(row, self.rows[0])]
        if len(rows) == 1:
            return {}
        return step_errors(
            rows, (run_row(self.pipe, row, asked, seeds, self.guidance_scale, every_step=True) for row in rows)
        )


def _short(conditions: Sequence[Any]) -> Any:
    """Conditions as they are, or a digest of very many."""
    if len(conditions) <= LONGEST:
        return list(conditions)
    digest = hashlib.sha256(json.dumps(list(conditions)).encode()).hexdigest()
    return {"count": len(conditions), "digest": digest}


def summary(
    task: Evaluation, folder: Folder, shards: Sequence[Shard], asked: Asked, baseline: str | None = None
) -> Comparison:
    """What finished shards say, in intervals of 95 % and differences to a row.

    Args:
        task, folder, shards: what was run, and what `work.run` returned.
        asked: names and classes of the task's conditions.
        baseline: label of the row that differences are taken from.
    """
    numbers = [j for shard in shards for j in shard.samples]
    made = folder.read(shards[0]).timing["provenance"]
    made |= {"command": command(), "shards": len(shards), "metrics": list(task.metrics)}
    judged = asked.classes is not None and "accuracy" in task.metrics
    return summarise(
        task.rows,
        map(folder.read, shards),
        labels=[asked.names[j % len(asked.names)] for j in numbers],
        seeds=[task.seed + j for j in numbers],
        provenance=made,
        classes=[asked.classes[j % len(asked.classes)] for j in numbers] if judged and asked.classes else None,
        sets=[name for name in SETS if name in task.metrics],
        baseline=baseline,
    )
