"""Ask the model in training the questions of `evaluation.suites` every `evaluation.suites_every` steps and at the end.

The ranks divide the questions; rank 0 alone makes the examinations, judges the answers and writes the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from core.errors import ConfigError, LeviathanError, UnreadableFileError, one_line
from data.corpus import Corpus
from data.images.media import ImageDescription
from parallel.fsdp import release
from parallel.parallelize import ParallelModel
from train.callbacks.base import Callback, TrainingRun
from train.callbacks.logging import LoggingCallback
from train.config import EvaluationConfig, Phase, TrainConfig, phases
from train.eval.generate import CachedModel, Continuation
from train.eval.scoring_model import NO_ENCODER, ScoringModel, TextTokenizer, over_ranks
from train.exam.ask import Asked, continuation, greedy_answers, run_on_main
from train.exam.base import Exam, NotAsked, Question, fingerprint
from train.exam.config import SuiteConfig
from train.exam.registry import make_suite, read_suites
from train.exam.results import asked_before, scores_of
from train.exam.run import Ask, run_suite
from train.metrics import StepMetrics, append_or_log
from train.overlap.corpus import blocks, trained_sources
from train.overlap.search import Overlap, SearchCache, Searches, put_beside, sizes, texts_of_exam
from train.run_directory import unreadable

BATCH_SIZE = 8
"""Most questions that are answered side by side."""


@dataclass(frozen=True)
class Suite:
    """A suite and its examinations by label."""

    config: SuiteConfig
    exams: Mapping[str, Exam]


def make_suites(config: EvaluationConfig) -> dict[str, Suite]:
    """Make the suites of a run by name. Raises `ConfigError` as `make_suite` does, also if a sandbox is missing."""
    try:
        return {name: Suite(one, make_suite(one)) for name, one in read_suites(config.suites).items()}
    except ConfigError as error:
        raise ConfigError("evaluation.suites", None, str(error)) from None


def check_questions(config: TrainConfig, suites: Mapping[str, Suite], corpus: Corpus) -> None:
    """Raise `ConfigError` for a suite of which the model can be asked nothing in a phase: no question fits the context,
    all have pictures that the model cannot read, or all are broken.
    """
    images = None if config.model.vision is None else corpus.images
    model = AskedModel(corpus.tokenizer, min((phase.seq_len for phase in asking_phases(config)), default=0), images)
    for name, suite in suites.items():
        asked = [(label, continuation(model, one)) for label, exam in suite.exams.items() for one in exam.questions()]
        reasons = [(label, one.reason) for label, one in asked if isinstance(one, NotAsked)]
        if len(reasons) == len(asked):
            label, reason = reasons[0]
            raise ConfigError("evaluation.suites", name, f"nothing of it can be asked; {label}: {reason}")


def asking_phases(config: TrainConfig) -> Iterator[Phase]:
    """Yield the phases in or after which suites are asked."""
    found, every = phases(config), config.evaluation.suites_every
    for phase in found:
        first = (phase.start // every + 1) * every if every else phase.stop + 1
        if phase is found[-1] or first <= phase.stop:
            yield phase


@dataclass(frozen=True)
class AskedModel:
    """What of a model decides whether a question can be asked."""

    tokenizer: TextTokenizer
    context: int
    images: ImageDescription | None
    pictures: str = NO_ENCODER


class ModelInTraining(ScoringModel):
    """The whole model of a run in progress on one rank. Like a sharded one, it does without inference mode, which would
    leave tensors behind with which no gradient is computed, and without copies of its matrices.
    """

    def cached(self) -> CachedModel:
        device = next(self.network.parameters()).device
        forward = lambda tokens_BT, given: self.network(tokens_BT.to(device), given)  # noqa: E731
        return CachedModel(forward, self.context, device, sharded=True)


class SuiteCallback(Callback):
    """Asks suites, and writes the results to evaluations.jsonl, the log and the writer of `logging`.

    What fails when it is asked, judged or written is logged, and the run goes on.
    """

    only_reports = True

    def __init__(self, trainer: TrainingRun, logging: LoggingCallback) -> None:
        super().__init__(trainer)
        self.logging, world = logging, trainer.world
        self.suites = make_suites(trainer.config.evaluation) if world.is_main else {}
        self._overlaps: dict[str, dict[str, Overlap]] | None = None
        self._asked_at, self._names = trainer.step, world.from_main(self._names_to_ask)

    def before_training(self) -> None:
        """Ask what a run that was interrupted had not yet asked at the step of its checkpoint."""
        steps = self.trainer.step
        if steps and self._is_due(steps):
            self.ask()

    def after_rewind(self) -> None:
        self._asked_at = self.trainer.step

    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        if self._is_due(steps):
            self.ask()

    def at_end(self) -> None:
        self.ask()

    def ask(self) -> None:
        """Ask all suites that have not been asked at this step."""
        trainer = self.trainer
        names = [name for name, is_new in self._names.items() if is_new or trainer.step != self._asked_at]
        if not names:
            return
        with trainer.pause():
            if self._overlaps is None and trainer.config.evaluation.search_tokens:
                self._overlaps = self._search()
            for name in names:
                line = self._line(name)
                if line is not None and trainer.world.is_main:
                    self._keep(name, line)

    def _is_due(self, steps: int) -> bool:
        every = self.trainer.config.evaluation.suites_every
        return bool(every) and steps % every == 0 and steps != self.trainer.steps

    def _names_to_ask(self) -> dict[str, bool]:
        """Return the suites, and whether each is still to be asked at this step. Rank 0 calls this."""
        path, step = self.trainer.directory.evaluations, self.trainer.step
        prints = {
            name: {label: fingerprint(exam) for label, exam in suite.exams.items()}
            for name, suite in self.suites.items()
        }
        try:
            return {name: not asked_before(path, step, name, one) for name, one in prints.items()}
        except (OSError, UnreadableFileError) as error:
            raise unreadable(path, error) from None

    def _line(self, name: str) -> dict[str, Any] | None:
        """Return the results of a suite on every rank; None if it cannot be asked. The model comes back as it was."""
        trainer = self.trainer
        world, model = trainer.world, trainer.engine.placed.model
        line: dict[str, Any] = {"model": None, "step": trainer.step, "decoding": "greedy"}
        model.eval()
        try:
            return line | run_on_main(world, self._ask, partial(self._run, name))
        except Exception as error:  # an examination of the user's own, or a sandbox that is gone
            if world.size > 1 and not getattr(error, "everywhere", False):
                raise  # the other ranks have not failed, and would wait for this one
            trainer.log(f"suite {name} has no result at step {trainer.step}: {one_line(error)}")
            return None
        finally:
            model.train()
            release(self._placed.stacks)

    @property
    def _placed(self) -> ParallelModel:
        placed = self.trainer.engine.placed
        assert isinstance(placed, ParallelModel)
        return placed

    def _run(self, name: str, ask: Ask) -> dict[str, Any]:
        return run_suite(self.suites[name].config, ask, self.suites[name].exams)

    def _ask(self, questions: Sequence[Question]) -> Sequence[str | NotAsked]:
        """Answer questions. All ranks call this together."""
        trainer, placed, world = self.trainer, self._placed, self.trainer.world
        phase = trainer.phase(max(0, trainer.step - 1))
        images = None if trainer.config.model.vision is None else trainer.corpus.images
        given = _no_logits, trainer.corpus.tokenizer, phase.seq_len, ("training",), lambda: images
        model = over_ranks(ModelInTraining(placed.model, *given), placed, world)
        return greedy_answers(model, _batch_size(model, phase, questions))(questions)

    def _keep(self, name: str, line: dict[str, Any]) -> None:
        """Write results. Rank 0 calls this."""
        trainer = self.trainer
        why = "evaluation.search_tokens=0" if self._overlaps is None else "the corpus could not be read"
        put_beside(line, (self._overlaps or {}).get(name, {}), why)
        append_or_log(trainer.directory.evaluations, line, trainer.log)
        scores = scores_of(line)
        if self.logging.writer is not None:
            known = {label: one for label, one in scores.items() if one.is_known}
            shown = {label: {"score": one.score, "low": one.low, "high": one.high} for label, one in known.items()}
            self.logging.writer.write({"step": trainer.step, "tokens": trainer.tokens, "examinations": shown})
        for label, one in scores.items():
            trainer.log(f"examination {label}: {one}")

    def _search(self) -> dict[str, dict[str, Overlap]]:
        """Look for the questions of all suites in the training corpus, each rank in a part of it. Results of an earlier
        search are taken from the run's directory.
        """
        trainer, limit = self.trainer, self.trainer.config.evaluation.search_tokens
        corpus, world = trainer.corpus, trainer.world
        sources = trained_sources(trainer.config, corpus)
        keys, known, missing = world.from_main(lambda: self._known(sources))
        searches, chosen = Searches(missing), blocks(corpus, sources, limit)
        failure = ""
        if searches.needed:
            trainer.log(f"looking for the questions of {', '.join(self._names)} in the training corpus")
            try:
                searches.read(corpus, chosen[world.rank :: world.size])
            except (LeviathanError, OSError, ValueError) as error:
                failure = one_line(error)
        found_Q = torch.from_numpy(searches.found_Q).to(trainer.world.device, torch.int32)
        votes = torch.cat([found_Q, torch.tensor([int(bool(failure))], dtype=torch.int32, device=world.device)])
        trainer.meshes.world.sum(votes, "evaluation")
        *found, failed = votes.tolist()
        if failed:
            trainer.log(f"the questions are not looked for: {failure or 'another rank cannot read the corpus'}")
            return {}
        if missing:
            total = sizes(corpus, sources, chosen, searches)
            new = searches.overlaps(torch.tensor(found).bool().numpy(), *total)
            known |= new
            if world.is_main:
                SearchCache(trainer.directory.path).put(new)
        return {name: {label: known[key] for label, key in of_suite.items()} for name, of_suite in keys.items()}

    def _known(self, sources: Sequence[str]) -> tuple[dict[str, dict[str, str]], dict[str, Overlap], dict[str, Any]]:
        """Return the key of each examination's search by suite and label, the results that are known, and the texts of
        the questions of the others. Rank 0 calls this.
        """
        trainer, cache = self.trainer, SearchCache(self.trainer.directory.path)
        limit = trainer.config.evaluation.search_tokens
        keys: dict[str, dict[str, str]] = {name: {} for name in self.suites}
        known, missing = dict[str, Overlap](), dict[str, Any]()
        for name, suite in self.suites.items():
            for label, exam in suite.exams.items():
                texts = texts_of_exam(exam)
                key = keys[name][label] = cache.key(texts, trainer.corpus, sources, limit)
                if (stored := cache.get(key)) is not None:
                    known[key] = stored
                else:
                    missing[key] = texts
        return keys, known, missing


def _batch_size(model: Asked, phase: Phase, questions: Sequence[Question]) -> int:
    """Return how many questions to answer side by side: as many as have the tokens of a micro-batch, 8 at most."""
    asked = (continuation(model, one) for one in questions)
    tokens = [len(one.prompt) + one.config.tokens for one in asked if isinstance(one, Continuation)]
    return max(1, min(BATCH_SIZE, phase.micro_batch_size * phase.seq_len // max(tokens, default=1)))


def _no_logits(tokens_BT: torch.Tensor, images: Any = None) -> torch.Tensor:
    raise NotImplementedError("the model in training continues prompts only")
