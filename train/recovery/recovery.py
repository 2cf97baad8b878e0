"""Watch a run, and mend it: an alarm leads to a cause, a step back to a good checkpoint, and amendments from there on.

All ranks decide alike without asking each other, because they see the same signals. Rank 0 alone writes.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

from core.errors import ConfigError, Diverged, LeviathanError
from core.exit_codes import host_name
from core.files import sha256_text
from core.package_guard import sources_digest
from train.checkpoint.manager import remove_checkpoints
from train.metrics import StepMetrics, append_or_log
from train.recovery.amendments import KEY, LowerRate, run_amendments, void
from train.recovery.attribution import Attribution, Blame, Cause, RecoverableRun
from train.recovery.config import RecoveryMode, WithoutCheckpoint
from train.recovery.detector import NOT_FINITE, Detector, Finding
from train.recovery.ledger import ACTION, ALARM, EVIDENCE, NOTE, STOP, VERDICT, Ledger
from train.recovery.replicas import CORRUPT_HOSTS, REPLICAS, Mismatch, Replicas, digests
from train.recovery.signals import LOSS, NORM, ROUTER, SignalReader
from train.run_directory import committed

LIMITS = {LOSS: "loss_ratio", NORM: "norm_ratio", **dict.fromkeys(ROUTER, "router_ratio")}
"""By detector: the setting that its threshold comes from, besides `deviations`."""
SHOWN = 20
"""Most blocks that differ between replicas to name in the ledger."""
UNRESOLVED = (ALARM, EVIDENCE, VERDICT)


class NotRecoveredError(LeviathanError):
    """Trouble came again after all retries, or there is no checkpoint from before it."""

    everywhere = True


class Recovery:
    """The recovery of one run. Make it before the run restores a checkpoint: it removes those that are void."""

    def __init__(self, run: RecoverableRun) -> None:
        self.run, self.config = run, run.config.recovery
        world, directory, corpus = run.world, run.directory, run.corpus.fingerprint
        self.detector, self.reader = Detector(self.config), SignalReader()
        self.recorded: dict[int, dict[str, float]] = {}
        """The signals of the last steps, by step counted from 1."""
        self.replicas = Replicas(world, run.meshes.world)
        self._compared: int | None = None
        identity = sha256_text(str(run.config.run.seed), corpus)[:16]
        self.ledger = Ledger(directory.ledger if world.is_main else None, identity, run.log)
        self.ledger.lines = world.from_main(self.ledger.read)
        given = None if self.config.amendments is None else Path(self.config.amendments).expanduser()
        self.amendments = world.from_main(lambda: run_amendments(directory.amendments, given, corpus))
        world.from_main(self._remove_void)
        run.batches.exclude(self.amendments.exclusions)
        if self.config.mode is RecoveryMode.act:
            run.checkpointer.keep_good = self.config.keep_good
            run.checkpointer.doubt = self.config.patience + self.config.lookback

    def learning_rate_factor(self, step: int) -> float:
        return self.amendments.learning_rate_factor(step)

    def after_step(self, steps: int, metrics: StepMetrics) -> bool:
        """Take the metrics of step number `steps`, counted from 1. Return whether the run has gone back.

        On a GPU the signals are read at the steps that wait for the device anyway: when a line is logged or a
        checkpoint saved. Raises `Diverged` or `NotRecoveredError` if the run cannot go on.
        """
        if self.config.mode is RecoveryMode.off:
            return False
        self.reader.add(steps, metrics)
        config, last = self.run.config, steps == self.run.steps
        intervals = config.logging.every, config.checkpoint.every, self.config.replicas_every
        waits = (every and steps % every == 0 for every in intervals)
        if self.run.world.device.type == "cuda" and not (last or any(waits)):
            return False
        for step, values in self.reader.read().items():
            if self.run.phase(step - 1).start == step - 1:
                self.detector.reset()
            self.recorded[step] = values
            self.recorded.pop(step - self.config.replayed_steps, None)
            findings = self.detector.observe(step, values)
            for finding in findings:
                if finding.healed:
                    self._note(finding)
            if alarms := [one for one in findings if not one.healed]:
                return self._alarm(alarms[0], metrics)
        return self._compare_replicas(steps, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as plain JSON: the amendments that its steps saw, and calm signals."""
        return {KEY: self.amendments.before(self.run.step).plain(), "recovery": self.detector.state_dict()}

    def load_state_dict(self, progress: dict[str, Any]) -> None:
        self.detector.load_state_dict(progress.get("recovery", {}))
        self.reader.forget()

    def _remove_void(self) -> None:
        """Remove, on rank 0, the checkpoints that the run must not resume from: those with other amendments, and those
        after an alarm that was not dealt with. Keep the run's amendments in its directory.
        """
        directory, amendments = self.run.directory, self.amendments
        present, lines = committed(directory.checkpoints), self.ledger.lines
        wrong = list(void(present, amendments, directory.amendments))
        if lines and lines[-1]["event"] in UNRESOLVED and self.config.mode is RecoveryMode.act:
            good = next((one.get("checkpoint") for one in reversed(lines) if one["event"] == ALARM), None)
            if good in {one.step for one in present}:
                wrong += [one for one in present if one.step > good]
        if present and len({one.step for one in wrong}) == len(present):
            changes = [*amendments.exclusions, *amendments.lower_rates]
            first = min((one.step for one in changes), default=0)  # type: ignore[attr-defined]
            reason = f"changes step {first} and later ones, and no checkpoint is from before it: name a new run"
            raise ConfigError("recovery.amendments", self.config.amendments, reason)
        for one in dict.fromkeys(wrong):
            self.run.log(f"checkpoint {one.path.name} is void after what recovery has changed: removed")
        remove_checkpoints(dict.fromkeys(wrong))
        if amendments.exclusions or amendments.lower_rates:
            amendments.write(directory.amendments, self.run.corpus.fingerprint)

    def _compare_replicas(self, steps: int, metrics: StepMetrics) -> bool:
        """Every `replicas_every` steps, compare what several ranks hold. Return whether the run has gone back."""
        every = self.config.replicas_every
        if not every or steps % every:
            return False
        wrong = self.replicas.compare(self.run.engine.state())
        if not wrong:
            self._compared = steps
            return False
        hosts, first = self.replicas.hosts(), 1 + (steps - every if self._compared is None else self._compared)
        ranks = sorted({rank for one in wrong for rank in one.wrong})
        statistics = {"blocks": len(wrong), "tensors": [one.tensor for one in wrong[:SHOWN]], "ranks": ranks}
        return self._alarm(Finding(REPLICAS, first, steps, False, statistics), metrics, (wrong, hosts))

    def _truth(self, wrong: list[Mismatch], hosts: list[str]) -> dict[str, Any]:
        """Return which ranks were wrong, now that the steps before a difference between replicas are repeated. Their
        hosts are noted for the launcher.
        """
        state = self.run.engine.state()
        again = {one.tensor for one in self.replicas.compare(state)}
        known: dict[str, int] = {}
        for one in self.run.world.gather(digests(state, {one.tensor for one in wrong}), REPLICAS):
            known |= one
        truth = {name: value for name, value in known.items() if name not in again}
        ranks = sorted({rank for one in wrong for rank in one.against(truth)})
        named = sorted({hosts[rank] for rank in ranks})
        if self.run.world.is_main and named:
            line = {"time": time.time(), "step": self.run.step, "hosts": named}
            self.run.directory.logs.mkdir(exist_ok=True)
            append_or_log(self.run.directory.logs / CORRUPT_HOSTS, line, self.run.log)
        return {"replicas": "differ again" if again else "agree again", "ranks": ranks, "hosts": named}

    def _note(self, finding: Finding) -> None:
        statistics = {"first": finding.first, **finding.statistics}
        self.ledger.write(NOTE, finding.step, detector=finding.detector, statistics=statistics)
        self.run.log(f"{finding.detector}: a spike from step {finding.first} to {finding.step} healed by itself")

    def _alarm(
        self, finding: Finding, metrics: StepMetrics, replicas: tuple[list[Mismatch], list[str]] = ([], [])
    ) -> bool:
        """Deal with an alarm. Return whether the run has gone back. `replicas`: what differs between which hosts."""
        run, config, acts = self.run, self.config, self.config.mode is RecoveryMode.act
        last = self.ledger.lines[-1] if self.ledger.lines else {}
        if not acts and finding.detector == NOT_FINITE == last.get("detector"):
            return False  # each step until the run ends is NaN
        retries = self._retries(finding.step)
        good = self._good(finding, retries) if acts else None
        counts = metrics.balance["counts"].tolist() if metrics.balance else None
        self.ledger.write(
            ALARM,
            finding.step,
            detector=finding.detector,
            statistics=_plain({"first": finding.first, **finding.statistics}),
            checkpoint=good,
            retries_left=max(0, config.retries - len(retries)),
            expert_load=counts,
            rank=run.world.rank,
            host=host_name(),
            ranks=run.world.size,
            layout=run.meshes.layout.axes,
            code=sources_digest(),
        )
        run.log(f"alarm: {_described(finding)}")
        if not acts:
            return False
        if good is None and finding.detector != NOT_FINITE and config.without_checkpoint is WithoutCheckpoint.go_on:
            self.ledger.write(ACTION, finding.step, detector=finding.detector, action="go_on")
            return False
        if good is None or len(retries) >= config.retries:
            self._stop(finding, metrics, good)
        assert good is not None
        run.checkpointer.discard(good)
        note = lambda trial, outcome: self._evidence(finding, trial, outcome)  # noqa: E731
        compare = partial(self._truth, *replicas)
        recorded = {step: values for step, values in self.recorded.items() if step > good}
        cause = Attribution(run, self.detector, finding, good, recorded, self.amendments, note, compare).find()
        self._act(finding, cause, len(retries))
        return True

    def _retries(self, step: int) -> list[dict[str, Any]]:
        """Return the actions that this alarm may be the consequence of, the last one first."""
        found: list[dict[str, Any]] = []
        for line in reversed(self.ledger.lines):
            if line["event"] == ACTION and line["action"] != "go_on":
                if abs(step - line["step"]) > self.config.forget:
                    break
                step = line["step"]
                found.append(line)
        return found

    def _good(self, finding: Finding, retries: list[dict[str, Any]]) -> int | None:
        """Return the step of the last checkpoint from before the trouble, or None. If going back to one did not help,
        an older one is better, if there is any.
        """
        present = [step for step in self.run.checkpointer.steps() if step < finding.first]
        tried = retries[0].get("checkpoint") if retries else None
        older = [step for step in present if tried is None or step < tried]
        early = [step for step in older if step < finding.first - self.config.lookback]
        return next((steps[-1] for steps in (early, older, present) if steps), None)

    def _stop(self, finding: Finding, metrics: StepMetrics, good: int | None) -> None:
        """Write the ledger's last words, and end the run."""
        if good is None:
            why = "no checkpoint is from before the trouble"
            advice = "save checkpoints (checkpoint.every), or set recovery.without_checkpoint=go_on"
        else:
            why, advice = f"it came again after {self.config.retries} retries", "see recovery.jsonl"
        if finding.detector in LIMITS:
            advice += f"; if the run is sound, raise recovery.{LIMITS[finding.detector]} or recovery.deviations"
        self.ledger.write(STOP, finding.step, detector=finding.detector, verdict=why, action="stop")
        if finding.detector == NOT_FINITE:
            if good is not None:
                self.run.log(f"not recovered: {why}")
            metrics.check_finite(finding.step)
            raise Diverged(_described(finding))
        raise NotRecoveredError(f"{_described(finding)}; {why}: {advice}")

    def _evidence(self, finding: Finding, trial: str, outcome: dict[str, Any]) -> None:
        self.ledger.write(EVIDENCE, finding.step, detector=finding.detector, trial=trial, outcome=_plain(outcome))
        said = {name: value for name, value in outcome.items() if name != "documents"}
        count = f" ({len(outcome['documents'])} documents)" if "documents" in outcome else ""
        self.run.log(f"trial {trial}{count}: {', '.join(f'{name} {value}' for name, value in said.items())}")

    def _act(self, finding: Finding, cause: Cause, retries: int) -> None:
        """Amend the run from the cause's checkpoint on, and go back to it."""
        run, config, step = self.run, self.config, cause.checkpoint
        exclusions, rates, actions = [one.excluded_from(step) for one in cause.suspects], list[LowerRate](), []
        if exclusions:
            actions.append("skip")
        match cause.verdict:
            case Blame.data_and_state | Blame.state | Blame.unknown:
                if config.lr_factor < 1 and config.lr_steps:
                    rates.append(LowerRate(step, step + config.lr_steps, config.lr_factor ** (retries + 1)))
                    actions.append("lower_rate")
            case Blame.data | Blame.corruption:
                pass
        documents = [one.plain() for one in cause.suspects]
        verdict, action = cause.verdict.value, "+".join(["rewind", *actions])
        common = {"detector": finding.detector, "verdict": verdict, "documents": documents}
        self.ledger.write(VERDICT, finding.step, **common, evidence=_plain(cause.evidence))
        lost = sum(_tokens(run, one) for one in range(step, finding.step))
        left = config.retries - retries - 1
        lower = [vars(one) for one in rates]
        self.ledger.write(
            ACTION,
            finding.step,
            **common,
            action=action,
            checkpoint=step,
            lower_rates=lower,
            tokens_lost=lost,
            retries_left=left,
        )
        self.amendments = self.amendments.plus(exclusions, rates)
        run.world.from_main(lambda: self.amendments.write(run.directory.amendments, run.corpus.fingerprint))
        run.checkpointer.discard(step)
        run.batches.exclude(self.amendments.exclusions)
        run.rewind(step)
        self.recorded = {one: values for one, values in self.recorded.items() if one <= step}
        run.world.from_main(lambda: run.directory.trim_metrics(step))
        run.log(f"{verdict}: {action}, on from step {step} ({lost:,} tokens lost, {left} retries left)")


def _tokens(run: RecoverableRun, step: int) -> int:
    phase = run.phase(step)
    return phase.global_batch_size * phase.seq_len


def _described(finding: Finding) -> str:
    found = finding.statistics
    if finding.detector == NOT_FINITE:
        what = " and ".join(f"the {name.replace('_', ' ')} is {value}" for name, value in found.items())
        return f"{what} at step {finding.step}"
    if finding.detector == REPLICAS:
        what = f"{found['blocks']} blocks of weights or moments differ between replicas"
        return f"{what}, the first {found['tensors'][0]}, since a step from {finding.first} to {finding.step}"
    where = f"from step {finding.first} to {finding.step}"
    return f"{finding.detector} rose to {found['value']:.4g} {where}, above its limit of {found['limit']:.4g}"


def _plain(value: Any) -> Any:
    """Return JSON values in which numbers that are not finite are text."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
