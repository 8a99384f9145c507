"""A genetic search over whole plans, after ECAD (arXiv 2506.15682): NSGA-II on quality and compute at once.

The genome is the table of the plan, steps x sites; see docs/planners.md for what is the paper's and what is not.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..cache import enable
from ..calibrate.setup import draw, made_for
from ..calibrate.trial import Trial
from ..describe import describe
from ..fill import Fill, Hold
from ..parts import check_choice, check_int, check_number, show
from ..plan import COMPUTE, REUSE, Plan
from ..recipe import Recipe
from ..when import Every, Table
from .errors import Progress

MUTATED = 0.05  # share of a starting plan's genes that are flipped in its copies
CROSSINGS = 4  # cuts between two parents


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried.

    Attributes:
        recipe: the plan as a recipe, for this pipeline and its number of steps.
        error: mean squared error of its pictures on the trial's samples.
        compute: FLOPs, as a share of those of the full run.
    """

    recipe: Recipe
    error: float
    compute: float


def evolve(
    trial: Trial,
    *,
    where: str = "module",
    genes: Literal["site", "kind"] = "site",
    fill: Fill | None = None,
    seeds: Iterable[Recipe] = (),
    population: int = 24,
    generations: int = 20,
    seed: int = 0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> list[Candidate]:
    """Searches for plans of which none is both cheaper and closer to the uncached pictures.

    Args:
        trial: the pictures that plans are judged on. Recipes are best judged again on other samples.
        where: the sites, as in a recipe.
        genes: a gene for every step and site, or one for all sites of a kind, which is a far smaller search.
        fill: what stands in for what is reused; None holds it.
        seeds: plans to begin with, beside even intervals of 1 to 5 steps; static schedules on these sites.
        population: plans of a generation.
        generations: how many, the first one included.
        seed: of the first generation, of crossings and mutations.
        seconds: no other plan is tried after so long; what was found until then is returned.
        progress: called after every plan as progress(plans, plans in all, what).

    Returns:
        The Pareto front of all plans that were tried, the cheapest first.

    Raises:
        ValueError: a value out of range, sites that the model does not have, or a seed that is no static plan of them.
        ImportError: pymoo is missing.
    """
    if importlib.util.find_spec("pymoo") is None:
        raise ImportError("genetic search needs pymoo: pip install 'dittocache[tune]'")
    check_choice("genes", genes, ("site", "kind"))
    check_int("population", population, 2)
    check_int("generations", generations, 1)
    check_int("seed", seed, 0, 2**32 - 1)
    if seconds is not None:
        check_number("seconds", seconds, 0)
    space = _Space(trial, where, fill or Hold(), genes)
    starts = [space.genome(recipe) for recipe in (*(Recipe(Every(n), where) for n in range(1, 6)), *seeds)]
    if len(starts) > population:
        raise ValueError(f"population must hold the {len(starts)} plans that it begins with; got {population}")
    first = _first(starts, population, np.random.default_rng(seed))
    tried: dict[bytes, Candidate] = {}
    began, total = time.monotonic(), population * generations

    def judge(genomes: np.ndarray) -> np.ndarray | None:
        """Error and compute of every plan; None if the time is up."""
        for genome in genomes:
            if seconds is not None and tried and time.monotonic() - began > seconds:
                return None
            if genome.tobytes() not in tried:
                tried[genome.tobytes()] = space.judged(genome)
            if progress:
                progress(len(tried), total, "genetic search")
        found = [tried[genome.tobytes()] for genome in genomes]
        return np.array([(candidate.error, candidate.compute) for candidate in found])

    _nsga2(judge, first, generations, seed)
    return front(tried.values())


def front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those of which no other is cheaper and as close, or closer and as cheap; the cheapest first."""
    found: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.compute, c.error)):
        if not found or candidate.error < found[-1].error:
            found.append(candidate)
    return found


class _Space:
    """Genomes of a pipeline's plans: bits [T - 1, genes], since step 0 is always computed.

    Attributes:
        trace: of an uncached run, with the FLOPs of its sites.
        sites: the columns of the trace.
        gene: [sites] which gene a column belongs to.
    """

    def __init__(self, trial: Trial, where: str, fill: Fill, genes: str) -> None:
        self.trial, self.where, self.fill = trial, where, fill
        with enable(trial.pipe, Recipe(Every(1), where, fill=fill)) as cache:
            draw(trial.pipe, trial.setup, trial.parts[0][:1])
            self.trace = cache.trace
        columns = {site.name: site for site in describe(trial.pipe.transformer).columns}
        self.sites = [columns[name] for name in self.trace.sites]
        names = self.trace.kinds if genes == "kind" else self.trace.sites
        _, self.gene = np.unique(names, return_inverse=True)
        self.shape = len(self.trace.steps) - 1, int(self.gene.max()) + 1

    def genome(self, recipe: Recipe) -> np.ndarray:
        """Bits of a recipe's plan: a gene is computed where any of its sites is.

        Raises:
            ValueError: it is not static, or not for this number of steps or these sites.
        """
        table = recipe.when.table(len(self.trace.steps), self.sites)
        if not np.isin(table, (COMPUTE, REUSE)).all():
            raise ValueError(f"a seed is a static plan of steps and sites; {show(recipe.describe())} is none")
        computed = [(table[1:, self.gene == gene] == COMPUTE).any(1) for gene in range(self.shape[1])]
        return np.stack(computed, axis=1).ravel()

    def plan(self, genome: np.ndarray) -> Plan:
        bits = genome.astype(bool).reshape(self.shape)[:, self.gene]
        table = np.where(np.vstack([np.ones_like(bits[:1]), bits]), COMPUTE, REUSE)
        return dataclasses.replace(self.trace, table=table, fills=None)

    def judged(self, genome: np.ndarray) -> Candidate:
        plan, pipe, setup = self.plan(genome), self.trial.pipe, self.trial.setup
        provenance = {"search": "NSGA-II on squared error and FLOPs", "setup": setup.to_dict()}
        origin = made_for(pipe, setup)
        recipe = Recipe(Table(plan), self.where, fill=self.fill, provenance=provenance, made_for=origin)
        return Candidate(recipe, self.trial.error(recipe), plan.compute_fraction)


def _first(starts: Sequence[np.ndarray], population: int, generator: np.random.Generator) -> np.ndarray:
    """The plans to begin with, and mutated copies of them."""
    copies = [starts[n % len(starts)].copy() for n in range(population - len(starts))]
    flipped = [copy ^ (generator.random(copy.shape) < MUTATED) for copy in copies]
    return np.array([*starts, *flipped])


def _nsga2(judge: Callable[[np.ndarray], np.ndarray | None], first: np.ndarray, generations: int, seed: int) -> None:
    """NSGA-II on bits with both objectives to be small, until there are so many generations or judge says None."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.pntx import PointCrossover
    from pymoo.operators.mutation.bitflip import BitflipMutation
    from pymoo.problems.static import StaticProblem

    problem = Problem(n_var=first.shape[1], n_obj=2, xl=0, xu=1, vtype=bool)
    algorithm = NSGA2(
        pop_size=len(first), sampling=first, crossover=PointCrossover(n_points=CROSSINGS), mutation=BitflipMutation()
    )
    algorithm.setup(problem, termination=("n_gen", generations), seed=seed, verbose=False)
    while algorithm.has_next():
        asked = algorithm.ask()
        objectives = judge(asked.get("X").astype(bool))
        if objectives is None:
            return
        Evaluator().eval(StaticProblem(problem, F=objectives), asked)
        algorithm.tell(infills=asked)
