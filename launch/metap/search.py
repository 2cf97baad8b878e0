"""Search for the learning rate with Optuna instead of a grid. Several machines can share the journal of trials."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.config import plain
from core.errors import ConfigError, LeviathanError
from core.exit_codes import INTERRUPTED
from launch.metap.config import SweepConfig
from launch.metap.runs import SweepSetting, but_rate_and_seed, is_done, loss_of, member, one_run
from train.run_directory import RunDirectory

WORST = 1e9
"""Loss that the search assigns to a diverged run."""


def search(config: SweepConfig, chosen: Sequence[SweepSetting], out: Path) -> int:
    """Try `trials` rates per setting and minimise the mean loss over seeds. Resumes from the journal."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise ConfigError("sweep.trials", config.trials, "needs Optuna: pip install 'leviathan[search]'") from None
    assert config.trials is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(out / "journal.log")))
    for one in chosen:
        name, bounds = one.name(config.axis), f"{config.seeds} {config.low} {config.high}"
        kind = json.dumps(plain(but_rate_and_seed(one.base)), sort_keys=True) + bounds
        study = optuna.create_study(
            storage=storage,
            study_name=f"{name}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}",
            sampler=optuna.samplers.TPESampler(n_startup_trials=min(4, config.trials)),  # no seed, so machines differ
            load_if_exists=True,
        )
        while len(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))) < config.trials:
            trial = study.ask()
            log2_lr = round(trial.suggest_float("log2_lr", config.low, config.high), 2)
            loss = _mean_loss(config, one, log2_lr, out)
            if loss is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                return INTERRUPTED
            study.tell(trial, loss)
        best: Any = study.best_trial
        print(f"search: {name}: best 2^{best.params['log2_lr']:.2f}, loss {best.value:.4f}", flush=True)
    return 0


def _mean_loss(config: SweepConfig, one: SweepSetting, log2_lr: float, out: Path) -> float | None:
    """Return the mean loss over seeds, or None if a run was interrupted."""
    losses = []
    for seed in range(config.seeds):
        run = member(config, one, log2_lr, seed, out)
        code = 0 if is_done(run) else one_run(run)
        if code == INTERRUPTED:
            return None
        path = RunDirectory.of(run).path
        loss = loss_of(path)
        if code or loss is None:
            raise LeviathanError(f"{path} failed; rerun the same command to resume")
        losses.append(WORST if math.isinf(loss) else loss)
    return sum(losses) / len(losses)
