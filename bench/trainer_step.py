"""Compare a step of the trainer with a bare PyTorch loop over the same model, data and optimizer, in one process.

Two runs from the same seed take the same steps in turn: one calls `Trainer.train_step`, the other the loop below.
Their losses are compared before anything is timed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Result, interleaved, median_ratio, spread
from core.config import load
from model.attention.plan import ForwardContext
from parallel.comm.world import connect
from train.config import TrainConfig
from train.corpus import get_corpus
from train.metrics import Log
from train.run_directory import RunDirectory
from train.trainer import Trainer

OVERRIDES = [
    *("hparam=none", "training.global_batch_size=8", "training.micro_batch_size=8"),
    *("schedule.kind=constant", "schedule.warmup_steps=0"),
]


def make_trainer(root: Path, name: str, overrides: Sequence[str] = ()) -> Trainer:
    config = load("train", TrainConfig, [*OVERRIDES, *overrides, f"run.root={root}", f"run.name={name}"])
    world, directory = connect(), RunDirectory.of(config)
    directory.open(config)
    corpus = get_corpus(config, world, lambda line: None)
    return Trainer(config, config.parallel.resolve(world.size), world, directory, corpus, Log(None))


class BareLoop:
    """A handwritten training loop."""

    def __init__(self, trainer: Trainer) -> None:
        self.model, self.loader = trainer.engine.placed.model, trainer.loaders["main"]
        config = trainer.config.optimizer
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        gains = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}]
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
        self.routers = trainer.balancer.routers.values()
        self.step = 0

    def __call__(self) -> Tensor:
        batch = self.loader.batch(self.step)
        context = ForwardContext(batch.positions_BT, routed_tokens=float(batch.tokens_BT.numel()))
        logits = self.model(batch.tokens_BT, context)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for router in self.routers:  # updates the selection biases, which are part of the model
            router.step(router.counts_E.clone())
        self.step += 1
        return loss.detach()


def run() -> list[Result]:
    with tempfile.TemporaryDirectory() as root:
        trainer, other = make_trainer(Path(root), "ours"), make_trainer(Path(root), "bare")
        bare = BareLoop(other)
        for _ in range(3):
            ours, theirs = trainer.train_step(trainer.step).loss.item(), bare().item()
            if abs(ours - theirs) > 1e-4:
                raise AssertionError(f"losses differ: {ours} and {theirs}")
        a, b = interleaved([lambda: trainer.train_step(trainer.step), bare], rounds=31)
    ratio, note = median_ratio(a, b), f"smoke model, 2,048 tokens, median of 31 pairs, spread {spread(a):.0%}"
    name = "trainer step vs bare PyTorch loop (s)"
    return [Result(name, statistics.median(a), statistics.median(b), ratio, "<= 1.03", ratio <= 1.03, note)]
