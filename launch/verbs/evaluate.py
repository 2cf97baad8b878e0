"""The verb `evaluate`: held-out loss of a run, loss of a text, tasks of the evaluation harness, or a suite of
examinations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import plain
from core.errors import ConfigError, LeviathanError, check_numbers
from launch.config import LaunchKind, local_launch
from launch.ranks import check_model, run_verb
from precision.config import Backend
from train.config import SEARCH_TOKENS
from train.exam.config import SuiteConfig

if TYPE_CHECKING:
    from parallel.comm.world import World


_OTHERWISE = ". To evaluate without the run's corpus, add text=FILES; if its tokens were moved, tokens=DIRECTORY"


@dataclass(frozen=True)
class EvaluateConfig:
    """Compute the held-out loss of a run's last checkpoint, the loss of a text, run tasks of the evaluation harness
    (lm-eval), or a suite of examinations.
    """

    run: str = "???"
    """Directory of a run. For a text, tasks or a suite, also of an imported model or a model in the Hugging Face
    format.
    """
    text: str | None = None
    """Compute the loss of this text: a file, a folder or a glob pattern of text, jsonl or parquet files with a column
    `text`.
    """
    tokens: str | None = None
    """Directory of the run's tokens (`data.tokens`) if it was moved; null: where it was during the run."""
    sequences: int | None = None
    """Held-out sequences per source; null: as many as during the run."""
    micro_batch_size: int | None = None
    """Sequences per forward pass. null: as during the run, which reproduces its loss bit for bit; for tasks, suites
    and the text of other models, 8.
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
    """JSON file for the results of tasks or of a suite, with every answer."""
    suite: SuiteConfig | None = None
    """Examinations, judged by our own code: a preset (suite=smoke). The results of a run are appended to its
    evaluations.jsonl.
    """
    against: str | None = None
    """Directory of another run, or a JSON file written by `out`: compare the suite's results with the last ones there.
    """
    corpus: str | None = None
    """Files of text (jsonl, parquet or text) in which to look for the questions of tasks or of a suite; null: the
    training corpus of a run. The questions of other models are then not looked for.
    """
    search_tokens: int = SEARCH_TOKENS
    """Most tokens in which the questions are looked for; 0: do not look."""
    launch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        not_negative = ("few_shot", "search_tokens")
        check_numbers(self, positive=("sequences", "micro_batch_size", "limit"), not_negative=not_negative)
        if self.corpus is not None and not self.tasks and self.suite is None:
            raise ConfigError("corpus", self.corpus, "applies to tasks and suites; name some")
        if self.tasks and self.text is not None:
            raise ConfigError("text", self.text, "cannot be combined with tasks; drop one")
        if self.suite is not None and (self.tasks or self.text is not None):
            raise ConfigError("suite", self.suite.name, "cannot be combined with tasks or a text; drop one")
        if self.against is not None and self.suite is None:
            raise ConfigError("against", self.against, "applies to suites only; name one: suite=smoke")
        for key in ("sequences", "tokens"):
            if getattr(self, key) is not None and (self.tasks or self.text is not None or self.suite is not None):
                what = "tasks" if self.tasks else "a text" if self.text is not None else "a suite"
                raise ConfigError(key, getattr(self, key), f"applies to the held-out loss, not to {what}; drop it")
        for key in ("task_path", "limit", "few_shot", "out"):
            value = getattr(self, key)
            if value is not None and not (self.tasks or (key == "out" and self.suite is not None)):
                raise ConfigError(key, value, "applies to tasks only; name some in tasks")


def run(config: EvaluateConfig) -> int:
    """Print the results. A loss is printed as JSON."""
    launch = local_launch(config.launch)
    is_run = check_model(config.run, config.backend)
    if not (is_run or config.tasks or config.suite is not None or config.text is not None):
        reason = "is a model without held-out text: add text=FILES or tasks=[...], or suite=NAME"
        raise ConfigError("run", config.run, reason)
    if launch.kind is LaunchKind.torchrun:
        return run_verb("evaluate", config, launch)
    from parallel.comm.world import connect

    with closing(connect()) as world:
        if config.tasks:
            return _run_tasks(config, world)
        if config.suite is not None:
            return _run_suite(config, config.suite, is_run, world)
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
        if answers:
            line["answers"] = {name: one.plain() for name, one in answers.items()}
    return line


def _model_loss(config: EvaluateConfig, world: World) -> dict[str, Any]:
    """Return the loss of the given text under a model that is not a run."""
    from train.eval.open_model import is_ours, open_foreign
    from train.eval.scoring_model import open_stored
    from train.eval.text_files import foreign_text_loss, place, text_loss

    path = Path(config.run).expanduser()
    if not is_ours(path):
        return plain(foreign_text_loss(open_foreign(path, world), str(config.text), config.micro_batch_size or 8))
    stored = open_stored(path)
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
        corpus=config.corpus,
        search_tokens=config.search_tokens,
    )


def _run_suite(config: EvaluateConfig, suite: SuiteConfig, is_run: bool, world: World) -> int:
    """Print the results of a suite as JSON without the single answers, and keep them all."""
    from core.files import append_json_line, check_target, local_path, write_json
    from train.eval.open_model import open_scoring_model
    from train.exam.ask import greedy_answers, run_on_main
    from train.exam.base import Exam
    from train.exam.registry import make_suite
    from train.exam.results import check_comparable, compare_suites, last_results
    from train.exam.run import nothing_asked, run_suite, summary
    from train.overlap.search import put_beside, search_for_model, texts_of_exam
    from train.run_directory import EVALUATIONS

    def check() -> tuple[Mapping[str, Any] | None, Any]:
        """Report mistakes before the model is read. Return the other results, and which questions were trained on."""
        if config.out is not None:
            check_target("out", config.out, ".json")
        if is_run:
            check_target("run", str(path / EVALUATIONS), Path(EVALUATIONS).suffix)
        exams.update(make_suite(suite))
        texts = {label: texts_of_exam(exam) for label, exam in exams.items()}
        other = None if config.against is None else last_results(config.against, suite.name)
        if other is not None:
            check_comparable(other, exams)
        return other, search_for_model(texts, path, config.corpus, config.search_tokens)

    path, exams = Path(config.run).expanduser(), dict[str, Exam]()  # the examinations of rank 0
    other, overlaps = world.from_main(check)
    model = open_scoring_model(path, world, config.backend)
    line: dict[str, Any] = {"model": model.fingerprint, "step": model.step, "decoding": "greedy"}
    examine = partial(run_suite, suite, exams=exams)
    line |= run_on_main(world, greedy_answers(model, config.micro_batch_size or 8), examine)
    if (reason := nothing_asked(line)) is not None:
        raise ConfigError("suite", suite.name, f"nothing of it can be asked; {reason}")
    if not world.is_main:
        return 0
    put_beside(line, *overlaps)
    targets = [(path / EVALUATIONS, append_json_line)] * is_run
    if config.out is not None:
        targets.append((local_path("out", config.out), write_json))
    failures = []
    for target, write in targets:  # one that fails does not keep the results from the other
        try:
            write(target, line)
        except OSError as error:
            failures.append(f"{target} ({error.strerror or error})")
    shown = summary(line)
    if other is not None:
        shown["against"] = compare_suites(other, line)
    print(json.dumps(shown, indent=2))
    if failures:
        raise LeviathanError(f"the results above could not be written to {' and '.join(failures)}")
    return 0
