"""The verb `evaluate`: held-out loss of a run, or its results on tasks of the evaluation harness."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import ConfigError, check_numbers
from precision.config import Backend

if TYPE_CHECKING:
    from parallel.comm.world import World


@dataclass(frozen=True)
class EvaluateConfig:
    """Compute the held-out loss of a run's last checkpoint, or run tasks of the evaluation harness (lm-eval)."""

    run: str = "???"
    """Directory of a run. For tasks, also of an imported model or a model in the Hugging Face format."""
    sequences: int | None = None
    """Held-out sequences per source; null: as many as during the run."""
    micro_batch_size: int | None = None
    """Sequences per forward pass. null: as during the run, which reproduces its loss bit for bit; for tasks, 8."""
    backend: Backend | None = None
    """GEMM backend; null: as in training. Applies to runs only: other models are evaluated in float32."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks; empty: the held-out loss."""
    task_path: str | None = None
    """Directory with your own task files (YAML)."""
    limit: int | None = None
    """Examples per task; null: all."""
    few_shot: int | None = None
    """Solved examples before each question; null: as the task defines."""
    out: str | None = None
    """JSON file for the tasks' results and samples."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("sequences", "micro_batch_size", "limit"), not_negative=("few_shot",))
        if self.tasks and self.sequences is not None:
            raise ConfigError("sequences", self.sequences, "applies to the held-out loss, not to tasks; drop it")
        for key in ("task_path", "limit", "few_shot", "out"):
            value = getattr(self, key)
            if value is not None and not self.tasks:
                raise ConfigError(key, value, "applies to tasks only; name some in tasks")


def run(config: EvaluateConfig) -> int:
    """Print the results. The held-out loss is printed as JSON."""
    import torch

    from parallel.comm.world import connect
    from train.checkpoint.restore import restore
    from train.eval.contamination import MODELS
    from train.eval.held_out import held_out_loss

    with closing(connect()) as world:
        if config.tasks:
            return _run_tasks(config, world)
        restored = restore(Path(config.run), world, config.backend, MODELS)
        result = held_out_loss(
            restored.placed,
            restored.loader(),
            torch.from_numpy(restored.tokenizer.token_bytes()),
            config.sequences or restored.config.evaluation.sequences,
            config.micro_batch_size or restored.phase.micro_batch_size,
            restored.weights(),
        )
        if world.is_main:
            print(json.dumps({"step": restored.step, **result.plain()}, indent=2))
        return 0


def _run_tasks(config: EvaluateConfig, world: World) -> int:
    try:
        from train.eval.lm_eval import run_tasks
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ConfigError("tasks", None, "need the evaluation harness: pip install 'leviathan[eval]'") from None
    return run_tasks(
        Path(config.run).expanduser(),
        config.tasks,
        world,
        backend=config.backend,
        batch_size=config.micro_batch_size or 8,
        task_path=config.task_path,
        limit=config.limit,
        few_shot=config.few_shot,
        out=config.out,
    )
