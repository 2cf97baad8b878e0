"""The run's rules: clipping, phases, what may change when it goes on, and that nothing learnt is lost at its end."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from core.errors import CheckpointError
from launch.cli import main
from model.attention.plan import SequenceContext
from parallel.comm.world import World
from tests.support.tiny import EXACT, TINY, trainer
from train.callbacks import evaluation, summary
from train.checkpoint.restore import restore
from train.config import phases
from train.engine.fsdp import TorchEngine
from train.eval.generate import GenerateConfig, continue_tokens, model_logits
from train.loss import token_losses
from train.metrics import expert_load, peak_memory_bytes
from train.run_directory import MARKER, committed
from train.signals import SignalFlag
from train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))


def train(root: Path, corpus: list[str], *overrides: str) -> int:
    return main(["train", *TINY, *corpus, f"run.root={root}", "run.name=run", "training.steps=4", *overrides])


def norm_of(run) -> float:
    return float(sum(p.grad.double().square().sum() for p in run.engine.placed.model.parameters()).sqrt())


@pytest.mark.parametrize("limit, after", [(1e-3, 1e-3), (1e3, None), (None, None)])
def test_clipping_scales_down_what_is_above_the_limit_and_nothing_else(tmp_path, small_corpus, limit, after):
    run = trainer(tmp_path, "run", [*small_corpus, *EXACT])
    run.engine.forward_backward(run.loaders["main"].batch(0), 2)
    before = norm_of(run)
    assert before > 0.01
    assert run.engine.clip(limit).item() == pytest.approx(before, rel=1e-9)
    assert norm_of(run) == pytest.approx(after or before, rel=1e-3 if after else 1e-12)


PHASE = "phases=[{name: longer, steps: 4, seq_len: 96, global_batch_size: 4, weights: {text: 1.0, code: 0.0}}]"


def test_a_phase_has_its_own_schedule_batch_and_blend(tmp_path, small_corpus):
    schedule = ["schedule.kind=cosine", "schedule.warmup_steps=2"]
    run = trainer(tmp_path, "run", [*small_corpus, *EXACT, *schedule, "training.steps=6", PHASE])
    first, second = phases(run.config)
    assert (second.start, second.stop, second.seq_len, second.global_batch_size) == (6, 10, 96, 4)
    assert [second.learning_rate_factor(6 + step) for step in range(4)] == [
        run.config.schedule.factor(step, 4) for step in range(4)
    ]
    assert first.learning_rate_factor(5) != second.learning_rate_factor(6)
    rates = [run.train_step(step).learning_rate for step in range(8)]
    assert rates[6] == pytest.approx(second.learning_rate_factor(6) * run.config.optimizer.lr)
    batches = {name: loader.batch(0) for name, loader in run.loaders.items()}
    assert batches["longer"].tokens_BT.shape == (4, 96)
    sources = {name: set(batch.sources_B.tolist()) for name, batch in batches.items()}
    assert len(sources["longer"]) == 1 < len(sources["main"])


def test_begun_phases_and_the_seed_may_not_change(tmp_path, small_corpus, capsys):
    assert train(tmp_path, small_corpus, PHASE) == 0
    capsys.readouterr()
    for change in ("run.seed=5", "optimizer.lr=0.5"):
        assert train(tmp_path, small_corpus, PHASE, change) == 2
        assert "was started with" in capsys.readouterr().err
    assert train(tmp_path, small_corpus, PHASE.replace("seq_len: 96", "seq_len: 48")) == 2
    assert train(tmp_path, small_corpus, PHASE, "data.verify=false") == 0, "checks nothing that was learnt"
    assert train(tmp_path, small_corpus, PHASE.replace("seq_len: 96", "seq_len: 96, micro_batch_size: 1")) == 0


def test_a_first_mistake_may_be_mended_under_the_same_name(tmp_path, small_corpus, capsys):
    assert train(tmp_path, small_corpus, "model.vocab_size=128") == 2
    assert "the tokenizer has" in capsys.readouterr().err
    assert train(tmp_path, small_corpus) == 0


def test_a_damaged_last_checkpoint_is_replaced(tmp_path, small_corpus):
    assert train(tmp_path, small_corpus, "checkpoint.every=2") == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    data = next((checkpoints / "step-00000004").glob("*.bin"))
    data.write_bytes(data.read_bytes()[:-10])
    (tmp_path / "run" / "summary.json").unlink()
    assert train(tmp_path, small_corpus, "checkpoint.every=2") == 0
    assert [found.step for found in committed(checkpoints)] == [2, 4]
    assert restore(tmp_path / "run", ALONE).step == 4


def test_damage_found_by_a_look_at_the_run_changes_nothing(tmp_path, small_corpus, capsys):
    assert train(tmp_path, small_corpus, "checkpoint.every=2") == 0
    data = next((tmp_path / "run" / "checkpoints" / "step-00000004").glob("*.bin"))
    data.write_bytes(data.read_bytes()[:-10])
    capsys.readouterr()
    assert restore(tmp_path / "run", ALONE).step == 2
    assert data.exists() and (data.parent / MARKER).exists()
    said = capsys.readouterr()
    assert "step-00000004 is damaged" in said.err and said.out == "", "evaluate's output is JSON"
    restore(tmp_path / "run", replace(ALONE, rank=1))
    assert capsys.readouterr().err == "", "the main rank speaks for all"


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"files": null}', b'{"files": {"a": {}}}', b"\xff\xfe"])
def test_an_unreadable_marker_is_damage_like_any_other(tmp_path, small_corpus, content):
    assert train(tmp_path, small_corpus, "checkpoint.every=2") == 0
    (tmp_path / "run" / "checkpoints" / "step-00000004" / MARKER).write_bytes(content)
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "run/checkpoints/step-00000009.bak")
    assert restore(tmp_path / "run", ALONE).step == 2


def test_the_model_is_saved_before_the_last_evaluation(tmp_path, small_corpus, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "held_out_loss", stopped)
    assert train(tmp_path, small_corpus) == 130
    assert restore(tmp_path / "run", ALONE).step == 4


def test_nonsense_takes_no_good_checkpoints_place(tmp_path, small_corpus, capsys):
    diverging = ["optimizer=sgd", "optimizer.lr=1e30", "training.clip_norm=null", "logging.every=10"]
    assert train(tmp_path, small_corpus, *diverging, "checkpoint.every=1") == 1
    assert "start a new run" in capsys.readouterr().err
    assert [found.step for found in committed(tmp_path / "run" / "checkpoints")] == [1]


def with_an_infinite_gradient(monkeypatch, at: int) -> None:
    """One element of one gradient at step `at`, counted from 1; the loss of that step is as it should be."""
    original, calls = TorchEngine.forward_backward, []

    def broken(self, batch, micro_batch_size):
        loss = original(self, batch, micro_batch_size)
        calls.append(loss)
        if len(calls) == at:
            next(self.placed.model.parameters()).grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(TorchEngine, "forward_backward", broken)


def kept(root: Path) -> list[int]:
    return [found.step for found in committed(root / "run" / "checkpoints")]


def test_a_gradient_that_is_no_number_takes_no_good_checkpoints_place(tmp_path, small_corpus, capsys, monkeypatch):
    with_an_infinite_gradient(monkeypatch, at=2)
    assert train(tmp_path, small_corpus, "checkpoint.every=1", "checkpoint.keep=1", "logging.every=10") == 1
    assert "the gradient norm after step 2 is inf: start a new run" in capsys.readouterr().err
    assert kept(tmp_path) == [1]


def test_nor_does_one_that_the_loss_has_not_met_yet(tmp_path, small_corpus, capsys, monkeypatch):
    """A weight that is no number may be of a token or an expert that the next steps do not need."""
    with_an_infinite_gradient(monkeypatch, at=2)
    monkeypatch.setattr(TorchEngine, "step", lambda self, factor: self.optimizer.zero_grad())
    assert train(tmp_path, small_corpus, "checkpoint.every=3", "logging.every=10") == 1
    assert "a loss or a gradient norm before step 3 was NaN or infinite" in capsys.readouterr().err
    assert kept(tmp_path) == []


def test_an_interrupted_run_saves_no_nonsense(tmp_path, small_corpus, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "_must_stop", lambda self, interruption, step: step == 2)
    with_an_infinite_gradient(monkeypatch, at=2)
    quiet = ["logging.every=10", "checkpoint.every=0"]
    assert train(tmp_path, small_corpus, *quiet) == 1
    assert "gradient norm after step 2 is inf" in capsys.readouterr().err and kept(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "_must_stop", lambda self, interruption, step: step == 2)
    assert train(tmp_path, small_corpus, *quiet) == 130 and kept(tmp_path) == [2]


def test_an_older_summary_does_not_make_a_run_finished(tmp_path, small_corpus, monkeypatch):
    """A phase is added, and the run is killed in its last evaluation: started again, it is not done yet."""

    def killed(self):
        raise KeyboardInterrupt

    assert train(tmp_path, small_corpus) == 0
    monkeypatch.setattr(evaluation.EvaluationCallback, "measure", killed)
    assert train(tmp_path, small_corpus, PHASE) == 130
    monkeypatch.undo()
    assert train(tmp_path, small_corpus, PHASE) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 8


def test_a_run_that_could_not_be_saved_fails(tmp_path, small_corpus, monkeypatch):
    import torch.distributed.checkpoint as dcp

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp, "save", full)
    assert train(tmp_path, small_corpus, "checkpoint.asynchronous=false") == 1
    with pytest.raises(CheckpointError):
        restore(tmp_path / "run", ALONE)


def test_a_run_of_many_ranks_can_be_looked_at_by_one(tmp_path, small_corpus):
    assert train(tmp_path, small_corpus) == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("dp_shard: auto", "dp_shard: 2"))
    assert "dp_shard: 2" in config.read_text()
    assert restore(tmp_path / "run", ALONE).step == 4


def test_evaluation_after_a_phase_is_at_its_context(tmp_path, small_corpus, capsys):
    assert train(tmp_path, small_corpus, PHASE) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == summary["heldout_loss"]


def test_baselines_see_every_token_of_the_run(tmp_path, small_corpus, monkeypatch):
    counted = 0
    add = summary.NgramBaseline.add

    def watched(self, tokens, labels):
        nonlocal counted
        counted += tokens.numel()
        add(self, tokens, labels)

    monkeypatch.setattr(summary.NgramBaseline, "add", watched)
    assert train(tmp_path, small_corpus, PHASE, "evaluation.baselines=true") == 0
    assert counted == json.loads((tmp_path / "run" / "summary.json").read_text())["tokens"]


@torch.no_grad()
def test_generation_sees_the_end_of_a_long_prompt(tmp_path, small_corpus):
    model = trainer(tmp_path, "run", [*small_corpus, *EXACT]).engine.placed.model
    config = GenerateConfig(run="", tokens=5, temperature=0)
    prompt = [step % 300 for step in range(0, 900, 13)]
    found = list(continue_tokens(partial(model_logits, model), prompt, 16, config, stop=-1))
    expected = list(prompt)
    for _ in range(5):
        window = torch.tensor([expected[-16:]])
        expected.append(int(model(window, SequenceContext(torch.arange(16)[None]))[0, -1].argmax()))
    assert found == expected[-5:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_ask_for_an_orderly_end(number):
    with SignalFlag() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested


def any_of(flagged: int) -> bool:
    from parallel.comm.world import connect

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
    assert 50e6 < peak_memory_bytes(torch.device("cpu")) < 64e9, "a process with torch, and not a data centre"


def test_the_loss_of_narrow_logits_is_computed_wide():
    logits = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16() * 3
    labels = torch.tensor([[4, 5, 6]])
    assert torch.equal(token_losses(logits, labels), token_losses(logits.float(), labels))


def narrow_router(root: Path, overrides: list[str]) -> list[torch.dtype]:
    """Formats in which routers' weights and logits are used in a bf16 run on these ranks."""
    from model.moe import Router

    found: list[torch.dtype] = []
    run = trainer(root, "run", overrides)
    for module in run.engine.placed.model.modules():
        if isinstance(module, Router):
            module.balance.register_forward_hook(lambda m, inputs, output: found.append(output.dtype))
            module.register_forward_hook(lambda m, inputs, output: found.append(m.weight.dtype))
    run.train_step(0)
    return found


@pytest.mark.parametrize("count", [1, 2])
def test_routers_stay_wide_in_bfloat16(ranks, small_corpus, tmp_path, count):
    for found in ranks(count, narrow_router, tmp_path, [*small_corpus, "precision=bf16"]):
        assert len(found) >= 4 and set(found) == {torch.float32}


def test_balancing_state_is_part_of_a_checkpoint(tmp_path, small_corpus):
    run = trainer(tmp_path, "run", [*small_corpus, *EXACT])
    kept = run.engine.placed.model.state_dict().keys()
    for name in ("bias_E", "load_E"):
        assert f"layers.1.ffn.router.balance.{name}" in kept
