"""A run clips gradients, follows its phases, rejects changes on resuming, and loses no result at its end."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from core.errors import CheckpointError
from launch.cli import main
from model.attention.plan import ForwardContext
from model.head import token_losses
from model.moe import Router
from parallel.comm.world import World, connect
from tests.support.tiny import EXACT, TINY, trainer
from train.callbacks import evaluation, summary
from train.checkpoint.restore import restore
from train.config import phases
from train.engine.fsdp import TorchEngine
from train.eval.config import GenerateConfig
from train.eval.generate import continue_tokens
from train.metrics import expert_load, peak_memory_bytes
from train.run_directory import MARKER, committed
from train.signals import SignalFlag
from train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
PHASE = "phases=[{name: longer, steps: 4, seq_len: 96, global_batch_size: 4, weights: {text: 1.0, code: 0.0}}]"


def train_in(root: Path, *overrides: str) -> int:
    usual = ["checkpoint.every=2", f"run.root={root}", "run.name=run", "training.steps=4"]
    return main(["train", *TINY, *usual, *overrides])


@pytest.fixture
def train(tmp_path, small_corpus) -> Callable[..., int]:
    return partial(train_in, tmp_path, *small_corpus)


@pytest.fixture(scope="module")
def finished(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train four steps with checkpoints of steps 2 and 4, for tests to copy."""
    root = tmp_path_factory.mktemp("finished")
    assert train_in(root, *small_corpus) == 0
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def kept(root: Path) -> list[int]:
    return [found.step for found in committed(root / "run" / "checkpoints")]


def norm_of(run) -> float:
    return float(sum(p.grad.double().square().sum() for p in run.engine.placed.model.parameters()).sqrt())


@pytest.mark.parametrize("limit, after", [(1e-3, 1e-3), (1e3, None), (None, None)])
def test_clipping_scales_down_only_above_the_limit(tmp_path, small_corpus, limit, after):
    run = trainer(tmp_path, "run", [*small_corpus, *EXACT])
    run.engine.forward_backward(run.loaders["main"].batch(0), 2)
    before = norm_of(run)
    assert before > 0.01
    assert run.engine.clip(limit).item() == pytest.approx(before, rel=1e-9)
    assert norm_of(run) == pytest.approx(after or before, rel=1e-3 if after else 1e-12)


def test_a_phase_has_its_own_schedule_batch_and_blend(tmp_path, small_corpus):
    schedule = ["schedule.kind=cosine", "schedule.warmup_steps=2"]
    run = trainer(tmp_path, "run", [*small_corpus, *EXACT, *schedule, "training.steps=6", PHASE])
    first, second = phases(run.config)
    assert (second.start, second.stop, second.seq_len, second.global_batch_size) == (6, 10, 96, 4)
    factors = [second.learning_rate_factor(6 + step) for step in range(4)]
    assert factors == [run.config.schedule.factor(step, 4) for step in range(4)]
    assert first.learning_rate_factor(5) != factors[0]
    rates = [run.train_step(step).learning_rate for step in range(8)]
    assert rates[6] == pytest.approx(factors[0] * run.config.optimizer.lr)
    batches = {name: loader.batch(0) for name, loader in run.loaders.items()}
    assert batches["longer"].tokens_BT.shape == (4, 96)
    assert torch.equal(run.batches._make(6).tokens_BT, batches["longer"].tokens_BT), "a phase starts its own order"
    sources = {name: set(batch.sources_B.tolist()) for name, batch in batches.items()}
    assert len(sources["longer"]) == 1 < len(sources["main"])


def test_baselines_see_every_token_and_begun_phases_stay(train, tmp_path, capsys, monkeypatch):
    counted, add = [], summary.NgramBaseline.add

    def watched(self, tokens, labels):
        counted.append(tokens.numel())
        add(self, tokens, labels)

    monkeypatch.setattr(summary.NgramBaseline, "add", watched)
    assert train(PHASE, "evaluation.baselines=true") == 0
    assert sum(counted) == json.loads((tmp_path / "run" / "summary.json").read_text())["tokens"]
    for changed in ([PHASE, "run.seed=5"], [PHASE, "optimizer.lr=0.5"], [PHASE.replace("seq_len: 96", "seq_len: 48")]):
        assert train(*changed) == 2
        assert "was started with" in capsys.readouterr().err
    assert train(PHASE.replace("seq_len: 96", "seq_len: 96, micro_batch_size: 1"), "data.verify=false") == 0


def test_a_first_mistake_is_corrected_under_the_same_name(train, capsys):
    assert train("model.vocab_size=128") == 2
    assert "the tokenizer has" in capsys.readouterr().err
    assert train("training.steps=1") == 0


def test_a_damaged_last_checkpoint_is_replaced(run, train, tmp_path, capsys):
    data = next((run / "checkpoints" / "step-00000004").glob("*.bin"))
    data.write_bytes(data.read_bytes()[:-10])
    assert restore(run, ALONE).step == 2
    said = capsys.readouterr()
    assert "step-00000004 is damaged" in said.err and said.out == "", "evaluate's output is JSON"
    assert data.exists() and (data.parent / MARKER).exists(), "reading a run changes nothing"
    restore(run, replace(ALONE, rank=1))
    assert capsys.readouterr().err == "", "rank 0 alone reports"
    (run / "summary.json").unlink()
    assert train() == 0
    assert kept(tmp_path) == [2, 4] and restore(run, ALONE).step == 4


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_the_model_is_saved_before_the_last_evaluation(train, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "held_out_loss", interrupted)
    assert train("checkpoint.every=0") == 130
    assert restore(tmp_path / "run", ALONE).step == 4


def test_an_older_summary_does_not_make_a_run_finished(run, train, monkeypatch):
    """Add a phase to a finished run, and interrupt the last evaluation."""
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.EvaluationCallback, "measure", interrupted)
        assert train(PHASE) == 130
    assert train(PHASE) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 8


def test_a_run_that_could_not_be_saved_fails(train, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.checkpoint.manager.write_shards", full)
    assert train("checkpoint.asynchronous=false") == 1
    with pytest.raises(CheckpointError):
        restore(tmp_path / "run", ALONE)


@pytest.mark.parametrize(
    "more, whole", [(["logging.every=10", "checkpoint.every=1"], [1]), (["checkpoint.every=0"], [])]
)
def test_a_diverged_loss_ends_the_run(train, tmp_path, capsys, more, whole):
    """A NaN loss is found before a checkpoint is saved, or when a line is logged."""
    assert train("optimizer=sgd", "optimizer.lr=1e30", "training.clip_norm=null", *more) == 1
    assert "is nan: start a new run" in capsys.readouterr().err
    assert kept(tmp_path) == whole


@pytest.fixture
def infinite_gradient(monkeypatch) -> None:
    """Make one element of a gradient infinite in step 2 (counted from 1). The loss of that step stays finite."""
    original, calls = TorchEngine.forward_backward, []

    def broken(self, batch, micro_batch_size):
        loss = original(self, batch, micro_batch_size)
        calls.append(loss)
        if len(calls) == 2:
            next(self.placed.model.parameters()).grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(TorchEngine, "forward_backward", broken)


def stop_at_2(monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "_must_stop", lambda self, interruption, step: step == 2)


@pytest.mark.parametrize("every, whole", [(1, [1]), (0, [])], ids=["checkpoint", "interruption"])
def test_an_infinite_gradient_is_not_saved(infinite_gradient, train, tmp_path, capsys, monkeypatch, every, whole):
    if not every:
        stop_at_2(monkeypatch)
    settings = "recovery.mode=off", f"checkpoint.every={every}", "checkpoint.keep=1", "logging.every=10"
    assert train(*settings) == 1
    assert "the gradient norm after step 2 is inf: start a new run" in capsys.readouterr().err
    assert kept(tmp_path) == whole


def test_nor_is_an_earlier_one_whose_loss_is_finite(infinite_gradient, train, tmp_path, capsys, monkeypatch):
    """A NaN weight may belong to a token or expert that later steps do not use, so their losses may be finite."""
    monkeypatch.setattr(TorchEngine, "step", lambda self, factor: self.optimizer.zero_grad())
    assert train("recovery.mode=off", "checkpoint.every=3", "logging.every=10") == 1
    assert "a loss or a gradient norm before step 3 was NaN or infinite" in capsys.readouterr().err
    assert kept(tmp_path) == []


def test_an_interrupted_run_is_saved(train, tmp_path, monkeypatch):
    stop_at_2(monkeypatch)
    assert train("checkpoint.every=0", "logging.every=10") == 130 and kept(tmp_path) == [2]


@torch.no_grad()
def test_generation_sees_the_end_of_a_long_prompt(tmp_path, small_corpus):
    model = trainer(tmp_path, "run", [*small_corpus, *EXACT]).engine.placed.model
    config = GenerateConfig(run="", tokens=5, temperature=0)
    prompt = [step % 300 for step in range(0, 900, 13)]
    found = list(continue_tokens(lambda tokens: model(torch.tensor([tokens]))[0, -1], prompt, 16, config, stop=-1))
    expected = list(prompt)
    for _ in range(5):
        window = torch.tensor([expected[-16:]])
        expected.append(int(model(window, ForwardContext(torch.arange(16)[None]))[0, -1].argmax()))
    assert found == expected[-5:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_ask_for_an_orderly_end(number):
    with SignalFlag() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested


def any_of(flagged: int) -> bool:
    world = connect()
    return world.any(world.rank == flagged)


def test_one_rank_is_enough_for_any(ranks):
    assert ranks(2, any_of, 1) == [True, True] and ranks(2, any_of, 5) == [False, False]


def test_expert_load_of_known_counts():
    even, single, half = expert_load(torch.tensor([[3, 3, 3, 3], [12, 0, 0, 0], [6, 6, 0, 0]]))
    assert even == {"max_over_mean": 1.0, "entropy": 1.0, "dead": 0}
    assert single["max_over_mean"] == 4 and single["dead"] == 3 and abs(single["entropy"]) < 1e-9
    assert half["entropy"] == pytest.approx(0.5)


def test_memory_is_in_bytes():
    assert 50e6 < peak_memory_bytes(torch.device("cpu")) < 64e9, "a process with torch"


def test_the_loss_of_narrow_logits_is_computed_wide():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16() * 3
    labels = torch.tensor([4, 5, 6])
    assert torch.equal(token_losses(logits, labels), token_losses(logits.float(), labels))


def narrow_router(root: Path, overrides: list[str]) -> list[torch.dtype]:
    """Return the dtypes of the routers' weights and logits in a bf16 run on these ranks."""
    found: list[torch.dtype] = []
    run = trainer(root, "run", overrides)
    for module in run.engine.placed.model.modules():
        if isinstance(module, Router):
            module.balance.register_forward_hook(lambda m, inputs, output: found.append(output.dtype))
            module.register_forward_hook(lambda m, inputs, output: found.append(m.weight.dtype))
    run.train_step(0)
    return found


def test_routers_stay_wide_in_bfloat16(ranks, small_corpus, tmp_path):
    for found in ranks(2, narrow_router, tmp_path, [*small_corpus, "precision=bf16"]):
        assert len(found) >= 4 and set(found) == {torch.float32}
