"""A search for the learning rate instead of a grid, by Optuna, whose journal several machines can share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from core.errors import ConfigError, LeviathanError
from launch.metap_sweep import RUNS, Setting, SweepConfig, loss_of, member, one_run, settings
from train.config import TrainConfig

WORST = 1e9
"""What a diverged run counts in the search."""


def search(config: SweepConfig, base: TrainConfig, out: Path) -> int:
    """`trials` rates for each setting; the mean of the seeds' losses decides. What is done is in the journal."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise ConfigError("sweep.trials", config.trials, "needs Optuna: pip install 'leviathan[search]'") from None
    assert config.trials is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(out / "journal.log")))
    for one in settings(config):
        name = one.name(config.axis)
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        begun = len(study.get_trials(deepcopy=False))  # or a search that goes on would propose its first rates again
        study.sampler = optuna.samplers.TPESampler(seed=begun, n_startup_trials=min(4, config.trials))
        finished = optuna.trial.TrialState.COMPLETE
        while len(study.get_trials(states=(finished,))) < config.trials:
            trial = study.ask()
            log2_lr = round(trial.suggest_float("log2_lr", config.low, config.high), 2)
            study.tell(trial, _mean_loss(config, base, one, log2_lr, out))
        best: Any = study.best_trial
        print(
            f"search: {one.name(config.axis)}: best 2^{best.params['log2_lr']:.2f}, loss {best.value:.4f}", flush=True
        )
    return 0


def _mean_loss(config: SweepConfig, base: TrainConfig, one: Setting, log2_lr: float, out: Path) -> float:
    losses = []
    for seed in range(config.seeds):
        run = member(config, base, one, log2_lr, seed, out)
        directory = out / RUNS / str(run.run.name)
        if loss_of(directory) is None and one_run(run):
            raise LeviathanError(f"{directory} failed; the same command goes on")
        loss = loss_of(directory)
        losses.append(WORST if loss is None or math.isinf(loss) else loss)
    return sum(losses) / len(losses)
