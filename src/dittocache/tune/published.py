"""Published methods as contenders: their parameters, searched by optuna."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# whole numbers and real numbers (on a logarithmic scale) of methods that need neither calibration nor training
SPACES: dict[str, dict[str, tuple[float, float]]] = {
    "fora": {"interval": (2, 8)},
    "taylorseer": {"interval": (2, 8), "order": (1, 3)},
    "goc": {"interval": (2, 8), "eta": (0.1, 1.0)},
    "toca": {"interval": (2, 8), "ratio": (0.02, 0.3)},
    "duca": {"interval": (2, 8), "ratio": (0.02, 0.3)},
    "fbcache": {"threshold": (0.01, 1.0)},
    "dicache": {"threshold": (0.02, 2.0)},
}
FIXED: dict[str, dict[str, Any]] = {"goc": {"computed_only": True}}
Numbers = Mapping[str, Any]


def explore(
    judged: Callable[[str, Mapping[str, Any]], Numbers | None],
    tries: int,
    loss: Callable[[Numbers], float],
    methods: Sequence[str] = tuple(SPACES),
    seed: int = 0,
) -> None:
    """Lets a sampler (TPE, two objectives: loss and speed) choose methods and parameters.

    Args:
        judged: the numbers of a method with parameters; None if it does not go with the model.
        tries: how many are judged.
        loss: of the numbers; less is better.
        methods: names, of `SPACES`.
        seed: of the sampler.

    Raises:
        ImportError: optuna is missing.
        ValueError: a method that is not searched here.
    """
    try:
        import optuna
    except ImportError:
        raise ImportError("searching published methods needs optuna: pip install 'dittocache[tune]'") from None
    for name in methods:
        if name not in SPACES:
            raise ValueError(f"{name!r} is not searched here; these are: {', '.join(SPACES)}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["minimize", "maximize"],
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=2 * len(methods)),
    )
    for name in methods:  # each method once, in the middle of its parameters
        middle = {p: (a + b) / 2 if not _whole(a, b) else int(a + b) // 2 for p, (a, b) in SPACES[name].items()}
        study.enqueue_trial({"method": name} | {f"{name} {p}": value for p, value in middle.items()})
    for _ in range(tries):
        trial = study.ask()
        name = trial.suggest_categorical("method", list(methods))
        params = {p: _suggest(trial, f"{name} {p}", *ends) for p, ends in SPACES[name].items()}
        numbers = judged(name, params | FIXED.get(name, {}))
        if numbers is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, [loss(numbers), numbers["speedup"]])


def _whole(low: float, high: float) -> bool:
    return isinstance(low, int) and isinstance(high, int)


def _suggest(trial: Any, name: str, low: float, high: float) -> Any:
    if _whole(low, high):
        return trial.suggest_int(name, low, high)
    return trial.suggest_float(name, low, high, log=True)
