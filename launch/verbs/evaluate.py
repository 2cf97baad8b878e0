"""The verb `evaluate`: held-out loss of a run, loss of a text, or results on tasks of the evaluation harness."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import plain
from core.errors import ConfigError, check_numbers
from launch.config import LaunchKind, local_launch
from launch.ranks import check_model, run_verb
from precision.config import Backend

if TYPE_CHECKING:
    from parallel.comm.world import World


_OTHERWISE = ". To evaluate without the run's corpus, add text=FILES; if its tokens were moved, tokens=DIRECTORY"


@dataclass(frozen=True)
class EvaluateConfig:
    """Compute the held-out loss of a run's last checkpoint, the loss of a text, or run tasks of the evaluation harness
    (lm-eval).
    """

    run: str = "???"
    """Directory of a run. For a text or tasks, also of an imported model or a model in the Hugging Face format."""
    text: str | None = None
    """Compute the loss of this text: a file, a folder or a glob pattern of text, jsonl or parquet files with a column
    `text`.
    """
    tokens: str | None = None
    """Directory of the run's tokens (`data.tokens`) if it was moved; null: where it was during the run."""
    sequences: int | None = None
    """Held-out sequences per source; null: as many as during the run."""
    micro_batch_size: int | None = None
    """Sequences per forward pass. null: as during the run, which reproduces its loss bit for bit; for tasks and for the
    text of other models, 8.
    """
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
    launch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_numbers(self, positive=("sequences", "micro_batch_size", "limit"), not_negative=("few_shot",))
        if self.tasks and self.text is not None:
            raise ConfigError("text", self.text, "cannot be combined with tasks; drop one")
        for key in ("sequences", "tokens"):
            if getattr(self, key) is not None and (self.tasks or self.text is not None):
                what = "tasks" if self.tasks else "a text"
                raise ConfigError(key, getattr(self, key), f"applies to the held-out loss, not to {what}; drop it")
        for key in ("task_path", "limit", "few_shot", "out"):
            value = getattr(self, key)
            if value is not None and not self.tasks:
                raise ConfigError(key, value, "applies to tasks only; name some in tasks")


def run(config: EvaluateConfig) -> int:
    """Print the results. A loss is printed as JSON."""
    launch = local_launch(config.launch)
    is_run = check_model(config.run, config.backend)
    if not (is_run or config.tasks or config.text is not None):
        raise ConfigError("run", config.run, "is a model without held-out text: add text=FILES or tasks=[...]")
    if launch.kind is LaunchKind.torchrun:
        if config.tasks:
            raise ConfigError("launch.kind", launch.kind, "tasks are evaluated by one process; remove it")
        return run_verb("evaluate", config, launch)
    from parallel.comm.world import connect

    with closing(connect()) as world:
        if config.tasks:
            return _run_tasks(config, world)
        found = _run_loss(config, world) if is_run else _model_loss(config, world)
        if world.is_main:
            print(json.dumps(found, indent=2))
        return 0


def _run_loss(config: EvaluateConfig, world: World) -> dict[str, Any]:
    """Return the loss of held-out text, or of the given text, under the last checkpoint of a run."""
    import torch

    from train.checkpoint.restore import restore
    from train.eval.answers import measure
    from train.eval.contamination import MODELS
    from train.eval.held_out import held_out_loss
    from train.eval.text_files import text_loss

    restored = restore(Path(config.run).expanduser(), world, config.backend, MODELS, config.tokens)
    micro_batch_size = config.micro_batch_size or restored.phase.micro_batch_size
    if config.text is not None:
        found = text_loss(restored.placed, restored.tokenizer, restored.phase.seq_len, config.text, micro_batch_size)
        return {"step": restored.step, **plain(found)}
    try:
        loader = restored.loader()
    except ConfigError as error:
        raise ConfigError(error.key, error.value, f"{error.reason}{_OTHERWISE}", error.legal) from None
    weights, sequences = restored.weights(), config.sequences or restored.config.evaluation.sequences
    result = held_out_loss(
        restored.placed,
        loader,
        torch.from_numpy(restored.tokenizer.token_bytes()),
        sequences,
        micro_batch_size,
        weights,
    )
    line = {"step": restored.step, **result.plain()}
    if restored.config.evaluation.answers:
        answers = measure(restored.placed, loader, weights, sequences, micro_batch_size, restored.corpus)
        line |= {"answers": {name: one.plain() for name, one in answers.items()}} if answers else {}
    return line


def _model_loss(config: EvaluateConfig, world: World) -> dict[str, Any]:
    """Return the loss of the given text under a model that is not a run."""
    from train.eval.scoring_model import open_stored
    from train.eval.text_files import place, text_loss

    stored = open_stored(Path(config.run).expanduser())
    placed = place(stored, world)
    return plain(text_loss(placed, stored.tokenizer, stored.context, str(config.text), config.micro_batch_size or 8))


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
