"""Find the cause of trouble by counterfactuals: repeat the steps before it, each time with one thing changed.

1. Repeat them as they were. If they do not come out bit for bit, the hardware is at fault: `corruption`.
2. Measure the losses of the sequences around the trouble. Those that stand out are suspects, and the documents in them.
3. Repeat the steps without the suspects. If the trouble stays, suspect all sequences of these steps. If it still stays,
   no data are at fault, but the state of the model and its learning rate: `state`.
4. Halve the suspects as long as the trouble stays away.
5. Measure the loss of what is left under an older checkpoint. If it stands out there too, the documents are to blame:
   `data`. If not, they only hurt this state of the model, so leaving them out may not be enough: `data_and_state`. This
   is what PaLM's authors found (Chowdhery et al. 2022, section 5.1).

Only steps are repeated, with the run's own code, so this works under every layout and engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from train.callbacks.base import TrainingRun
from train.metrics import StepMetrics
from train.recovery.amendments import Amendments
from train.recovery.detector import Detector, Finding
from train.recovery.replicas import REPLICAS
from train.recovery.signals import LOSS, NORM, SignalReader
from train.recovery.suspects import StepSequences, Suspect, documents, outliers, whole_sequence


class Blame(Enum):
    """What is to blame for trouble."""

    corruption = "corruption"
    """The same steps gave other results: hardware, or an operation that is not deterministic."""
    data = "data"
    """Documents, under an older state of the model as well."""
    data_and_state = "data_and_state"
    """Documents, but only together with the present state of the model."""
    state = "state"
    """The state of the model or its learning rate: the trouble comes with other data, too."""
    unknown = "unknown"
    """The steps that may be repeated (`recovery.replayed_steps`) were not enough."""


class RecoverableRun(TrainingRun, Protocol):
    """The part of a run that recovery uses. `train.trainer.Trainer` implements it."""

    def rewind(self, step: int) -> None:
        """Restore the newest checkpoint of at most `step` steps."""

    def repeat_step(self, look: Callable[[], None] = lambda: None) -> StepMetrics:
        """Train on the next global batch on trial: callbacks that only report do not see it. `look` is called once the
        sequences of the step are known.
        """


class OutOfStepsError(Exception):
    """Finding the cause would repeat more steps than the configuration allows."""


@dataclass(frozen=True)
class Cause:
    """What is to blame, the documents to skip, and the step of the checkpoint to go back to."""

    verdict: Blame
    checkpoint: int
    suspects: tuple[Suspect, ...] = ()
    evidence: dict[str, Any] = field(default_factory=dict)


class Attribution:
    """Finds the cause of one alarm. The run is left in the state of the last trial: go back to a checkpoint afterwards.

    `good`: the step of the last checkpoint from before the trouble. `recorded`: the signals of the steps since then, as
    far as they are known. `note`: gets the outcome of each trial. `compare`: says which replicas are wrong, once the
    steps before a difference between replicas are repeated.
    """

    def __init__(
        self,
        run: RecoverableRun,
        detector: Detector,
        finding: Finding,
        good: int,
        recorded: dict[int, dict[str, float]],
        amendments: Amendments,
        note: Callable[[str, dict[str, Any]], None],
        compare: Callable[[], dict[str, Any]],
    ) -> None:
        self.run, self.detector, self.finding, self.good = run, detector, finding, good
        self.recorded, self.amendments, self.note = recorded, amendments, note
        self.compare = compare
        self.config = run.config.recovery
        self.left = self.config.replayed_steps
        self.start = max(good, finding.first - 1 - self.config.lookback)
        """Number of steps after which the trials begin."""
        self.seen: dict[int, StepSequences] = {}
        """The sequences of the steps around the trouble, by step, in the last trial that looked at them."""
        self.outliers: dict[Suspect, StepSequences] = {}
        """The documents that stood out in any trial, and where."""

    def find(self) -> Cause:
        """Go through the trials. All ranks find the same, because they see the same signals and losses."""
        try:
            if difference := self._rerun():
                self.note("rerun", difference)
                return Cause(Blame.corruption, self.good, evidence=difference)
            self.note("rerun", {"same": True, "steps": self.finding.step - self.good})
            return self._blame_data()
        except OutOfStepsError:
            return Cause(Blame.unknown, self.good, evidence={"replayed_steps": self.config.replayed_steps})

    def _rerun(self) -> dict[str, Any]:
        """Repeat the steps up to the alarm, and save a checkpoint where further trials begin. Return the first signal
        that differs from the recorded one, or that the trouble stays away; empty if all is as before.
        """
        run = self.run
        run.rewind(self.good)
        reader, is_back = SignalReader(), False
        while run.step < self.finding.step:
            if run.step == self.start > self.good:
                run.checkpointer.keep += 1  # an older one is evidence later
                run.save()
                run.checkpointer.wait()
                run.checkpointer.keep -= 1
            values = self._step(reader)
            before = self.recorded.get(run.step)
            if before is not None and self._is_exact and (wrong := _different(before, values)):
                return {"step": run.step, "signal": wrong, "before": str(before[wrong]), "now": str(values[wrong])}
            is_back = any(not one.healed for one in self.detector.observe(run.step, values))
            if is_back:
                break
        if self.finding.detector == REPLICAS:
            return self.compare()
        return {} if is_back else {"trouble": "stays away"}

    @property
    def _is_exact(self) -> bool:
        """Whether the same steps must give the same bits as before."""
        if self.finding.detector == REPLICAS:
            return False
        return self.run.world.device.type == "cpu" or self.run.config.training.deterministic

    def _look(self) -> None:
        """Measure the sequences of the next step, and the documents in those that stand out."""
        run = self.run
        if not self.start <= run.step < self.finding.first:
            return
        now = self.seen[run.step] = StepSequences.of(run, run.step)
        for step, index in outliers({step: one.losses for step, one in self.seen.items()}, self.config):
            if step == run.step:
                self.outliers |= dict.fromkeys(documents(run, now, index), now)

    def _step(self, reader: SignalReader) -> dict[str, float]:
        """Repeat the next step; return its signals."""
        if not self.left:
            raise OutOfStepsError
        self.left -= 1
        if self.run.phase(self.run.step).start == self.run.step:
            self.detector.reset()
        reader.add(self.run.step + 1, self.run.repeat_step(self._look))
        return next(iter(reader.read().values()))

    def _blame_data(self) -> Cause:
        """Repeat the steps without the documents that stand out, then without all sequences. What replaces a document
        may stand out in turn: then it is a suspect, too.
        """
        run, limit = self.run, self.config.suspects
        everything = [whole_sequence(run, one, i) for one in self.seen.values() for i in range(len(one.sequences))]
        where = {one: self.seen[one.step] for one in everything}
        tried: list[Suspect] = []
        while len(self.outliers) > len(tried) and len(tried) < limit:
            tried = list(self.outliers)[:limit]
            where |= self.outliers
            if self._is_calm("without_outliers", tried):
                return self._judged(self._halved(tried), where)
        if limit and self._is_calm("without_all_sequences", everything):
            return self._judged(self._halved(everything), where)
        return Cause(Blame.state, self.start)

    def _is_calm(self, name: str, suspects: Sequence[Suspect]) -> bool:
        """Repeat the steps without the suspects; return whether the trouble stays away."""
        run = self.run
        run.batches.exclude(self.amendments.plus(one.excluded_from(self.start) for one in suspects).exclusions)
        run.rewind(self.start)
        reader, calm = SignalReader(), True
        while calm and run.step < self.finding.step:
            values = self._step(reader)
            calm = all(one.healed for one in self.detector.observe(run.step, values))
        calm = calm and not self.detector.is_spike(values)
        run.batches.exclude(self.amendments.exclusions)
        self.note(name, {"calm": calm, "documents": [one.plain() for one in suspects]})
        return calm

    def _halved(self, suspects: list[Suspect]) -> list[Suspect]:
        """Return a smaller set of suspects without which the trouble stays away. If it needs both halves, the search
        ends there.
        """
        while len(suspects) > 1:
            middle = len(suspects) // 2
            halves = (half for half in (suspects[:middle], suspects[middle:]) if self._is_calm("bisection", half))
            smaller = next(halves, None)
            if smaller is None:
                break
            suspects = smaller
        return suspects

    def _judged(self, suspects: list[Suspect], where: Mapping[Suspect, StepSequences]) -> Cause:
        """Return whether the suspects stand out under an older checkpoint as well, if there is one."""
        run = self.run
        older = [step for step in run.checkpointer.steps() if step < self.good]
        if not older:
            return Cause(Blame.data, self.start, tuple(suspects), {"older_checkpoint": None})
        run.rewind(older[-1])
        stands_out = True
        for one in suspects:
            losses = {one.step: where[one].measure(run)}
            stands_out = stands_out and (one.step, one.index) in outliers(losses, self.config)
        evidence = {"older_checkpoint": run.step, "stands_out_there": stands_out}
        self.note("older_checkpoint", evidence)
        return Cause(Blame.data if stands_out else Blame.data_and_state, self.start, tuple(suspects), evidence)


def _different(before: Mapping[str, float], now: Mapping[str, float]) -> str | None:
    """Return the first of loss and gradient norm that is not the same to the bit."""
    pairs = ((name, before[name], now[name]) for name in (LOSS, NORM))
    return next((name for name, a, b in pairs if a != b and not (math.isnan(a) and math.isnan(b))), None)
