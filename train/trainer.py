"""One run, from a checked configuration to a trained model in a directory. The loop reads like the algorithm."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from core.config import plain
from core.errors import ConfigError, Diverged, LeviathanError
from core.exit_codes import INTERRUPTED
from core.files import write_json
from core.package_guard import sources_digest
from data.corpus import Corpus
from data.filter.audit.outputs import keep_audit
from data.loader import Batch
from data.prefetch import Prefetcher
from data.tokenizer import vocabulary_fingerprint
from model.balancer import Balancer
from parallel.comm.world import World, connect, wait_for
from parallel.deepspeed.config import Offload
from parallel.mesh import make_meshes
from parallel.parallelize import build
from parallel.sharding import fill
from precision.resolve import resolve
from train.callbacks import base
from train.certify import store
from train.checkpoint.init_from import compare_vocabularies, copy_selection_biases, initial_source
from train.checkpoint.manager import Checkpointer
from train.config import Phase, TrainConfig, check, phase_of, phases
from train.corpus import check_same_data, get_corpus, run_loaders, source_weights
from train.data_metrics import DataMetrics
from train.engine.base import StepResult, optimizer_step
from train.engine.deepspeed import make_engine
from train.engine.fsdp import Engine
from train.environment import environment
from train.metap import hyperparameters
from train.metrics import Log
from train.online_filter import OnlineWindow
from train.run_directory import DIVERGED, RunDirectory, committed
from train.signals import SignalFlag
from train.stragglers import Stragglers

LOCK_PATIENCE_S = 120.0
ASK_EVERY = 10  # steps, on GPUs: asking waits for the device


@dataclass(frozen=True, kw_only=True)
class StepMetrics(StepResult):
    """A step's result and where the run stands; `tokens` is what it has consumed with this step. `finite`: whether the
    loss and the gradient norm of every step so far were, a bool still on the device.
    """

    learning_rate: float
    tokens: int
    finite: Tensor


class Trainer:
    """A run in progress. `step` counts the optimizer steps done."""

    def __init__(self, config: TrainConfig, world: World, directory: RunDirectory, corpus: Corpus, log: Log) -> None:
        self.config, self.world, self.directory, self.corpus, self.log = config, world, directory, corpus, log
        self.phases = phases(config)
        self.weights = source_weights(config, corpus)
        self.vocabulary = vocabulary_fingerprint(corpus.tokenizer)
        self.loaders = run_loaders(config, corpus, log)
        self.batches = Prefetcher(self._batch, config.data.prefetch)
        self.consumption = DataMetrics(corpus.sources, corpus.tokenizer.eos_id)
        saving = config.checkpoint
        at_once = config.parallel.zero.offload is Offload.nvme  # a copy of what is on disk would fill the memory
        asynchronous = saving.asynchronous and not at_once
        self.checkpointer = Checkpointer(directory.checkpoints, world, saving.keep, asynchronous, log)
        self.meshes = make_meshes(config.parallel.resolve(world.size), world)
        self.certificate = world.from_main(self._certificate)
        self.stragglers = Stragglers(world)
        self.step = self.tokens = 0
        self.window = OnlineWindow()
        self.paused_s = self.scoring_s = 0.0
        self.last: StepMetrics | None = None
        begun = world.from_main(lambda: bool(committed(directory.checkpoints)))
        source = None if begun else initial_source(config.model, config.run.seed, log)
        self.engine = self._build_engine()
        placed = self.engine.placed
        self.balancer = Balancer(placed.model, partial(self.meshes.world.sum, purpose="balance"))
        if progress := self.checkpointer.restore(self.engine.state()):
            self.engine.written()
            check_same_data(progress, corpus)
            self.step, self.tokens = progress["step"], progress["tokens"]
            self.window = OnlineWindow(**progress.get("window", {}))
            log(f"going on from step-{self.step:08d}")
        elif source is not None:
            fill(self.engine.weights(), source)
            self.engine.written()
            copy_selection_biases(placed.model, source, log)
            compare_vocabularies(source, self.vocabulary, log)
        if config.precision.uses_float8:
            log(str(resolve(config.precision, world.device)))
        placed.model.see_positions(phase_of(config, self.step).model)
        if world.is_main:
            directory.trim_metrics(self.step)

    @property
    def steps(self) -> int:
        return self.phases[-1].stop

    def phase(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.stop)

    def train_step(self, step: int) -> StepMetrics:
        """Consume the global batch of `step` and update the model."""
        self.world.pulse.step = step
        phase = self.phase(step)
        self.engine.placed.model.see_positions(phase.model)
        begin = time.perf_counter()
        batch = self.batches.get(step, self._known_until(phase))
        waited_s = time.perf_counter() - begin
        self.stragglers.loading_s += waited_s
        self.consumption.add(batch, waited_s)
        factor, clip_norm = phase.learning_rate_factor(step), self.config.training.clip_norm
        result = optimizer_step(self.engine, self.balancer, batch, phase.micro_batch_size, clip_norm, factor)
        self.step, self.tokens = step + 1, self.tokens + phase.global_batch_size * phase.seq_len
        finite = result.loss.isfinite() & result.gradient_norm.isfinite()
        if self.last is not None:
            finite = finite & self.last.finite
        rate = factor * self.config.optimizer.lr
        self.last = StepMetrics(**vars(result), learning_rate=rate, tokens=self.tokens, finite=finite)
        return self.last

    def _known_until(self, phase: Phase) -> int:
        """The step from which on it is not yet known what is trained on: online filtering decides window by window."""
        if not self.config.online.every:
            return self.steps
        return self.window.first_step + len(self.window.rows) // phase.global_batch_size

    def _batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of `step`: of the plain order, or of what online filtering took."""
        phase, axis = self.phase(step), self.meshes.rows
        rows = phase.global_batch_size // axis.size
        start, stop = axis.rank * rows, (axis.rank + 1) * rows
        loader = self.loaders[phase.name]
        if not self.config.online.every:
            return loader.batch(step - phase.start, start, stop)
        begin = (step - self.window.first_step) * phase.global_batch_size
        return loader.samples(self.window.rows[begin + start : begin + stop])

    def fit(self) -> int:
        """Train to the last step; returns the exit code. Interrupted, it saves and stops."""
        if self.step == self.steps and self.world.from_main(lambda: self.directory.is_summed_up(self.steps)):
            self.log(f"nothing left to do: the run has done its {self.steps} steps")
            self.log(f"run: {self.directory.path}")
            return 0
        extras = base.make(self)
        with SignalFlag() as interruption, self._finished_saves(), closing(self.batches):
            for step in range(self.step, self.steps):
                for extra in extras:
                    extra.before_step(step)
                metrics = self.train_step(step)
                for extra in extras:
                    extra.after_step(step + 1, metrics)
                if self._must_stop(interruption, step + 1):
                    self.save()
                    self.checkpointer.wait()
                    self.log(f"interrupted after step {step + 1}; the same command goes on from here")
                    self.log(f"run: {self.directory.path}")
                    return INTERRUPTED
            for extra in extras:
                extra.at_end()
        return 0 if self.checkpointer.has(self.step) else 1  # a full disk: the run is done and its model lost

    def save(self) -> None:
        """Start a checkpoint of the present state. Raises `LeviathanError` where a step gave what is no number: its
        checkpoint would take the place of a good one.
        """
        if self.last is not None:
            base.refuse_nonsense(self.last, self.step)
        progress = {
            "tokens": self.tokens,
            "corpus": self.corpus.fingerprint,
            "vocabulary": self.vocabulary,
            "phase": self.phase(self.step - 1).name,
            "layout": self.meshes.layout.axes,
            "certificate": self.certificate,
        }
        if self.config.online.every:
            progress["window"] = self.window.plain()
        self.checkpointer.save(self.step, self.engine.state(), progress)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens here is not training: neither its time nor its bytes count."""
        wait_for(self.world.device)
        begin, bytes_before = time.perf_counter(), self.meshes.traffic.take()
        with self.world.pulse.excuse():
            yield
        self.paused_s += time.perf_counter() - begin
        self.meshes.traffic.bytes = Counter(bytes_before)

    @contextmanager
    def _finished_saves(self) -> Iterator[None]:
        """An error that all ranks raise must not cost the checkpoint that is being written."""
        try:
            yield
        except LeviathanError:
            self.checkpointer.wait()
            raise

    def _must_stop(self, interruption: SignalFlag, step: int) -> bool:
        """All ranks must leave at the same step. On GPUs they are asked every few steps only."""
        if (
            self.world.device.type == "cuda"
            and self.world.size > 1
            and step % min(ASK_EVERY, self.config.logging.every)
        ):
            return False
        return self.world.any(interruption.requested)

    def _certificate(self) -> str | None:
        """The hash of a certificate of this code for the run's axes; says so where there is none and how to get one."""
        layout, cache = self.meshes.layout, Path(self.config.data.cache).expanduser()
        if not layout.axes:
            return None
        kind, precision = self.config.optimizer.kind, self.config.precision
        precision = replace(precision, recipe=precision.recipe.on(self.world.device))
        found = store.find(layout.axes, self.config.model, layout, cache, kind, precision)
        if found is None:
            self.log(
                f"no certificate for this layout and this code; to have one: leviathan certify {self.directory.path}"
            )
        return found

    def _build_engine(self) -> Engine:
        config = self.config
        placed = build(config.model, config.precision, self.meshes, self.world.device, config.run.seed)
        return make_engine(placed, config.optimizer, config.run.seed)


def run(config: TrainConfig) -> int:
    """The verb `train` on this rank: check, prepare, train, and return the exit code."""
    config = hyperparameters.resolve(config)
    check(config, int(os.environ.get("WORLD_SIZE", 1)))
    if config.run.name is None and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ConfigError("run.name", None, "a run that may be started again needs a name, or each start begins anew")
    world = connect()
    directory = RunDirectory(world.from_main(lambda: RunDirectory.of(config).path), config.checkpoint.directory)
    try:
        with world.watch(config.parallel.timeout_s, directory.logs):
            world.agree(_identity(config, world.device))
            resolve(config.precision, world.device)
            world.from_main(lambda: _claim(directory, config))
            log = Log(directory.path / "log.txt" if world.is_main else None)
            for line in hyperparameters.warnings(config):
                log(f"hyperparameters: {line}")
            corpus = get_corpus(config, world, log)
            world.from_main(lambda: keep_audit(corpus.directory, directory.path))
            return _fitted(Trainer(config, world, directory, corpus, log))
    finally:
        directory.release()
        world.close()


def _fitted(trainer: Trainer) -> int:
    """A run that diverged says so in its directory: a sweep takes it as a result."""
    try:
        return trainer.fit()
    except Diverged as error:
        if trainer.world.is_main:
            write_json(trainer.directory.path / DIVERGED, {"step": trainer.step, "reason": str(error)})
        raise


def _identity(config: TrainConfig, device: torch.device) -> dict[str, str]:
    """What all ranks of a run must have in common."""
    try:
        precision = str(resolve(config.precision, device))
    except ConfigError as error:  # one rank that lacks what others have must not end alone
        precision = str(error)
    text = json.dumps(plain(replace(config, launch={})), sort_keys=True)  # each node has a number of its own there
    return {
        "precision": precision,
        "configuration": hashlib.sha256(text.encode()).hexdigest()[:16],
        "code version": sources_digest(),
        "torch version": torch.__version__,
    }


def _claim(directory: RunDirectory, config: TrainConfig) -> None:
    """Started again, we may meet the last of those that went before."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("SLURM_RESTART_COUNT", "0")
    directory.lock(0.0 if again == ("0", "0") else LOCK_PATIENCE_S)
    directory.open(config)
    directory.logs.mkdir(exist_ok=True)
    write_json(directory.environment, environment())
