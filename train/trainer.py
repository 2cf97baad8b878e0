"""Train a model: one run, from a checked configuration to checkpoints and a summary in the run's directory."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core.config import absolute, plain
from core.errors import CheckpointError, ConfigError, Diverged, LeviathanError, one_line
from core.exit_codes import INTERRUPTED, has_agent
from core.files import check_target, write_json
from core.package_guard import sources_digest
from core.process import ending_with_parent
from data.corpus import Corpus, check_found
from data.filter.audit.outputs import keep_audit
from data.tokenizer import vocabulary_fingerprint
from model.attention.limits import slower_heads
from model.load_balance import Balancer
from parallel.comm.world import World, connect, device_of_rank, numbers_of_rank, wait_for
from parallel.deepspeed.config import Offload
from parallel.layout import Layout
from parallel.mesh import make_meshes
from parallel.sharding import fill
from precision.resolve import no_compilation, resolve, slow_experts
from train.batches import StepBatches
from train.callbacks import imported_callbacks, make_callbacks
from train.callbacks.base import Callback
from train.callbacks.suites import Suite, check_questions, make_suites
from train.certify import store
from train.checkpoint.index import check_run
from train.checkpoint.init_from import compare_vocabularies, copy_selection_biases, run_source
from train.checkpoint.manager import Checkpointer
from train.config import Objective, Phase, TrainConfig, check, phase_of, phases
from train.corpus import check_same_data, get_corpus, keep_tokenizer, run_loaders, source_weights, with_image_tokens
from train.engine.base import optimizer_step
from train.engine.deterministic import make_deterministic
from train.engine.garbage import collected_at_set_steps, collected_automatically
from train.engine.memory import check_memory
from train.engine.objective import objective_engine
from train.environment import environment
from train.eval.contamination import MODELS
from train.metap import hyperparameters
from train.metrics import Log, StepMetrics
from train.recovery.recovery import Recovery
from train.run_directory import DIVERGED, RunDirectory, committed, settings
from train.signals import SignalFlag
from train.stragglers import Stragglers

LOCK_PATIENCE_S = 120.0
POLL_EVERY = 10
"""On GPUs, the ranks agree on whether to stop at least once in this many steps. An agreement waits for the device."""


class LastSaveError(CheckpointError):
    """The run has done its steps, but its last state could not be saved."""

    everywhere = True


class Trainer:
    """A run in progress. `step` counts the optimizer steps done."""

    def __init__(
        self, config: TrainConfig, layout: Layout, world: World, directory: RunDirectory, corpus: Corpus, log: Log
    ) -> None:
        self.config, self.world, self.directory, self.corpus, self.log = config, world, directory, corpus, log
        self.phases = phases(config)
        self.weights = source_weights(config, corpus)
        self.vocabulary = vocabulary_fingerprint(corpus.tokenizer)
        self.loaders = run_loaders(config, corpus, log)
        self.meshes = make_meshes(with_image_tokens(layout, config, corpus), world)
        self.batches = StepBatches(config, self.phases, self.loaders, self.meshes, corpus.tokenizer.eos_id)
        paged = layout.zero.offload is Offload.nvme  # an asynchronous save would copy all paged state to memory
        asynchronous = config.checkpoint.asynchronous and not paged
        self.checkpointer = Checkpointer(directory.checkpoints, world, config.checkpoint.keep, asynchronous, log)
        self.certificate = world.from_main(self._certificate)
        self.stragglers = Stragglers(world)
        self.step = self.tokens = 0
        self.recovery = Recovery(self)
        self.paused_s = 0.0
        self.last: StepMetrics | None = None
        begun = world.from_main(lambda: bool(committed(directory.checkpoints)))
        source = None if begun else run_source(config, log)
        self.engine = objective_engine(config, corpus, self.meshes, world.device)
        self.batches.prepare = self.engine.prepare
        placed = self.engine.placed
        self.balancer = Balancer(placed.model, partial(self.meshes.world.sum, purpose="balance"))
        progress = self.checkpointer.restore(self.engine.state())
        if progress:
            self.engine.written()
            self.load_state_dict(progress)
            log(f"resuming from step-{self.step:08d}")
        elif source is not None:
            fill(self.engine.weights(), source)
            self.engine.written()
            copy_selection_biases(placed.model, source, log)
            compare_vocabularies(source, self.vocabulary, log)
        precision = resolve(config.precision, world.device)
        if config.precision.uses_float8:
            log(str(precision))
        if line := slower_heads(config.model, precision):
            log(line)
        if config.model.has_experts and (line := slow_experts(world.device)):
            log(line)
        placed.model.set_rope_config(phase_of(config, self.step).model)
        world.from_main(lambda: directory.trim_metrics(self.step))
        self.callbacks = make_callbacks(self)
        if progress:
            self._restore_callbacks(progress.get("callbacks", {}))

    @property
    def steps(self) -> int:
        return self.phases[-1].stop

    def phase(self, step: int) -> Phase:
        return self.batches.phase(step)

    def fit(self) -> int:
        """Train to the last step. On an interruption, save a checkpoint and stop. Returns the exit code."""
        if self.step == self.steps and self.world.from_main(lambda: self.directory.is_summed_up(self.steps)):
            self.log(f"nothing left to do: the run has done its {self.steps} steps")
            self.log(f"run: {self.directory.path}")
            return 0
        with (
            SignalFlag() as interruption,
            self._ended_by_errors(),
            closing(self.batches),
            collected_at_set_steps() as collect,
        ):
            for callback in self.callbacks:
                callback.before_training()
            while self.step < self.steps:
                for callback in self.callbacks:
                    callback.before_step(self.step)
                metrics = self.train_step(self.step)
                if self.recovery.after_step(self.step, metrics):
                    continue  # the run has gone back
                for callback in self.callbacks:
                    callback.after_step(self.step, metrics)
                collect(self.step)
                if self._must_stop(interruption, self.step):
                    self.save()
                    self.checkpointer.wait()
                    self.log(f"interrupted after step {self.step}; rerun the same command to resume")
                    self.log(f"run: {self.directory.path}")
                    return INTERRUPTED
            for callback in self.callbacks:
                callback.at_end()
        self.log(f"run: {self.directory.path}")
        if not self.checkpointer.has(self.step):
            reason = self.checkpointer.failure or "it is damaged"
            raise LastSaveError(f"the last checkpoint was not saved: {reason}; mend that and rerun the same command")
        return 0

    def train_step(self, step: int) -> StepMetrics:
        """Train on the global batch of `step`."""
        self.world.heartbeat.step = step
        phase = self.phase(step)
        if step == phase.start:
            self.engine.placed.model.set_rope_config(phase.model)
        batch = self.batches.get(step)
        factor = phase.learning_rate_factor(step) * self.recovery.learning_rate_factor(step)
        clip_norm = self.config.training.clip_norm
        result = optimizer_step(self.engine, self.balancer, batch, phase.micro_batch_size, clip_norm, factor)
        if self.last is None:  # the first step may compile kernels and connect to many ranks
            self.world.limit(self.config.parallel.timeout_s)
        self.step, self.tokens = step + 1, self.tokens + phase.global_batch_size * phase.seq_len
        finite = result.loss.isfinite() & result.gradient_norm.isfinite()
        if self.last is not None:
            finite = finite & self.last.finite
        rate = factor * self.config.optimizer.lr
        self.last = StepMetrics(**vars(result), learning_rate=rate, tokens=self.tokens, finite=finite)
        return self.last

    def rewind(self, step: int) -> None:
        """Restore the newest checkpoint of at most `step` steps, as a resumed run does: weights, moments, router state,
        the data's position and the state of the callbacks.
        """
        self.checkpointer.wait()
        progress = self.checkpointer.restore(self.engine.state(), step)
        if progress is None:
            raise CheckpointError(f"no checkpoint of at most {step} steps in {self.directory.checkpoints}")
        self.engine.written()
        self.last = None
        self.load_state_dict(progress)
        self.engine.placed.model.set_rope_config(phase_of(self.config, self.step).model)
        self._restore_callbacks(progress.get("callbacks", {}))
        for callback in self.callbacks:
            callback.after_rewind()

    def repeat_step(self, look: Callable[[], None] = lambda: None) -> StepMetrics:
        """Train on the next global batch on trial: callbacks that only report do not see it. `look` is called once the
        sequences of the step are known.
        """
        active = [callback for callback in self.callbacks if not callback.only_reports]
        for callback in active:
            callback.before_step(self.step)
        look()
        metrics = self.train_step(self.step)
        for callback in active:
            callback.after_step(self.step, metrics)
        return metrics

    def save(self) -> None:
        """Start to save a checkpoint. If a loss or gradient norm was NaN or infinite, raise `Diverged` instead, because
        the checkpoint would replace a good one.
        """
        if self.last is not None:
            self.last.check_finite(self.step)
        self.checkpointer.save(self.step, self.engine.state(), self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps besides tensors, as plain JSON. If you add a key, read it with `get`, because
        older checkpoints lack it.
        """
        return {
            "tokens": self.tokens,
            "corpus": self.corpus.fingerprint,
            "vocabulary": self.vocabulary,
            "phase": self.phase(self.step - 1).name,
            "settings": settings(self.config),
            "layout": self.meshes.layout.axes,
            "certificate": self.certificate,
            **self.recovery.state_dict(),
            "callbacks": {one.key: state for one in self.callbacks if (state := _state_of(one))},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a checkpoint's `state_dict`. The callbacks do not exist yet and load their state later."""
        check_same_data(state, self.corpus)
        if state.get("tokens", -1) < 0:
            raise CheckpointError(
                f"the checkpoint of step {state['step']} does not say how many tokens it was trained on"
            )
        self.step, self.tokens = state["step"], state["tokens"]
        self.recovery.load_state_dict(state)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the `with` block from the run's measured throughput and traffic."""
        wait_for(self.world.device)
        begin, bytes_before = time.perf_counter(), self.meshes.traffic.take()
        with self.world.heartbeat.excuse(), collected_automatically():
            yield
        self.paused_s += time.perf_counter() - begin
        self.meshes.traffic.bytes = Counter(bytes_before)

    @contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        """If all ranks raise a `LeviathanError`, finish the checkpoint that is being written before it propagates.
        A run that diverges also writes a file, from which a sweep reads the run's result.
        """
        try:
            yield
        except LeviathanError as error:
            if error.everywhere or self.world.size == 1:  # else the other ranks do not wait with this one
                self.checkpointer.wait()
            if isinstance(error, Diverged) and self.world.is_main:
                write_json(self.directory.path / DIVERGED, {"step": self.step, "reason": str(error)})
            raise

    def _must_stop(self, interruption: SignalFlag, step: int) -> bool:
        """Return whether to stop. All ranks agree, so that they stop at the same step; on GPUs only every few steps."""
        poll_every = min(POLL_EVERY, self.config.logging.every)
        if self.world.device.type == "cuda" and self.world.size > 1 and step % poll_every:
            return False
        return self.world.any(interruption.requested)

    def _restore_callbacks(self, states: dict[str, Any]) -> None:
        for callback in self.callbacks:
            if callback.key in states:
                try:
                    callback.load_state_dict(states[callback.key])
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    reason = f"callback {callback.key} cannot read its state in the checkpoint: {one_line(error)}"
                    raise CheckpointError(reason) from error
            elif type(callback).load_state_dict is not Callback.load_state_dict:
                self.log(f"callback {callback.key} has no state in the checkpoint and starts fresh")

    def _certificate(self) -> str | None:
        """Return the hash of the certificate of this code and layout. Without a certificate, log how to make one."""
        layout, cache = self.meshes.layout, Path(self.config.data.cache).expanduser()
        if not layout.axes or self.config.training.objective is not Objective.language:
            return None
        kind, precision, freeze = self.config.optimizer.kind, self.config.precision, self.config.training.freeze
        precision = replace(precision, recipe=precision.recipe.on(self.world.device))
        found = store.find(layout.axes, self.config.model, layout, cache, kind, precision, freeze)
        if found is None:
            self.log(
                f"no certificate for this layout and this code; to make one: leviathan certify {self.directory.path}"
            )
        return found


def run(config: TrainConfig) -> int:
    """Run the verb `train` on this rank: check, prepare, train. Returns the exit code."""
    config = absolute(hyperparameters.resolve(config))
    layout = check(config, numbers_of_rank()[1])
    if config.training.deterministic:
        make_deterministic()  # before the first use of a GPU
    check_memory(config, layout, device_of_rank())
    list(imported_callbacks(config))
    if config.run.name is None and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ConfigError("run.name", None, "with restarts a run needs a name, or each restart begins a new run")
    with ending_with_parent(has_agent()):
        world = connect()
    directory = RunDirectory(world.from_main(lambda: RunDirectory.of(config).path), config.checkpoint.directory)
    try:
        with world.watch(config.parallel.timeout_s, directory.logs):
            world.agree(_identity(config, world.device))
            resolve(config.precision, world.device)
            if config.parallel.compile and (reason := no_compilation(world.device)):
                raise ConfigError("parallel.compile", True, reason, [False])
            suites: dict[str, Suite] = {}  # of rank 0
            world.from_main(lambda: suites.update(make_suites(config.evaluation)))
            world.from_main(lambda: _claim(directory, config))
            log = Log(directory.path / "log.txt" if world.is_main else None)
            for line in hyperparameters.warnings(config):
                log(f"hyperparameters: {line}")
            with ending_with_parent(has_agent()):  # later, the training loop saves first
                corpus = get_corpus(config, world, log, MODELS)
                world.from_main(lambda: check_questions(config, suites, corpus))
                world.from_main(lambda: keep_audit(corpus.directory, directory.path))
                world.from_main(lambda: keep_tokenizer(corpus, directory))
                trainer = Trainer(config, layout, world, directory, corpus, log)
            return trainer.fit()
    finally:
        directory.release()
        world.close()


def _state_of(callback: Callback) -> dict[str, Any]:
    state = callback.state_dict()
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise LeviathanError(f"{callback.key}: state_dict() must return plain JSON values: {error}") from None
    return state


def _identity(config: TrainConfig, device: torch.device) -> dict[str, str]:
    """Return what all ranks of a run must have in common."""
    try:
        precision = str(resolve(config.precision, device))
    except ConfigError as error:  # `agree` then names a rank whose libraries differ
        precision = str(error)
    text = json.dumps(plain(replace(config, launch={})), sort_keys=True)  # `launch.node_rank` differs between nodes
    return {
        "precision": precision,
        "configuration": hashlib.sha256(text.encode()).hexdigest()[:16],
        "code version": sources_digest(),
        "torch version": torch.__version__,
    }


def _claim(directory: RunDirectory, config: TrainConfig) -> None:
    """Lock and open the directory. After a restart, wait for the previous attempt to release the lock."""
    check_found(config.data)  # before the directory is made
    if config.logging.prometheus is not None:
        check_target("logging.prometheus", config.logging.prometheus, ".prom")
    if not committed(directory.checkpoints):  # a run that resumes does not need the models that it began with
        run_source(config, lambda line: None)  # compares the networks before data are prepared
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("SLURM_RESTART_COUNT", "0")
    directory.lock(0.0 if restarts == ("0", "0") else LOCK_PATIENCE_S)
    directory.check(config)
    check_run(config, directory.checkpoints)
    directory.open(config)
    directory.logs.mkdir(exist_ok=True)
    write_json(directory.environment, environment())
