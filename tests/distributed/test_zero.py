"""DeepSpeed as the engine: certified layouts, checkpoints under either engine, and rejected configurations."""

from __future__ import annotations

import gc
import os
import time
import weakref
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch

from bench import engines
from core.config import load
from core.errors import ConfigError
from launch.rank_pool import Pool
from model.layers import Linear
from parallel.cost import static_bytes
from parallel.deepspeed import zero3, zero12
from parallel.deepspeed.config import VERSION
from parallel.deepspeed.offload import CHUNK, MappedFile, PagedAdamW
from parallel.sharding import ShardBlock
from tests.support.bugs import BuggyRanks
from tests.support.tiny import trainer
from train.certify.config import CertifyConfig
from train.certify.plan import TrialOutcome, compare_layouts, shrink, trials
from train.config import TrainConfig, check
from train.engine.deepspeed import ZeroEngine

ZERO = "parallel.engine=deepspeed"
ZERO3 = ["parallel.zero.stage=3", "model.moe_every=0"]
SHARDED3 = [*ZERO3, "+parallel.zero.extra.stage3_param_persistence_threshold=0"]  # else small parameters stay whole
LAYOUTS = {
    "zero1": ["parallel.dp_shard=2"],
    "zero2": ["parallel.dp_shard=2", "parallel.zero.stage=2"],
    "ep2 and edp2": ["parallel.dp_shard=4", "parallel.ep=2"],
    "ep2 and edp2, zero2": ["parallel.dp_shard=4", "parallel.ep=2", "parallel.zero.stage=2"],
    "tp2": ["parallel.tp=2", "parallel.dp_shard=1"],
    "tp2, zero2": ["parallel.tp=2", "parallel.dp_shard=1", "parallel.zero.stage=2"],
    "cp2": ["parallel.cp=2", "parallel.dp_shard=1"],
    "replicas": ["parallel.dp_replicate=2", "parallel.dp_shard=2"],
    "pp2": ["parallel.pp=2", "parallel.dp_shard=1"],
    "pp2, interleaved": ["parallel.pp=2", "parallel.dp_shard=1", "parallel.schedule=interleaved"],
    "pp2, zero bubble": ["parallel.pp=2", "parallel.dp_shard=1", "parallel.schedule=interleaved_zero_bubble"],
    "pp2, zbv": ["parallel.pp=2", "parallel.dp_shard=1", "parallel.schedule=zbv"],
    "pp2 and ep2": ["parallel.pp=2", "parallel.ep=2", "parallel.dp_shard=1"],
    "tied ends": ["parallel.pp=2", "parallel.dp_shard=1", "model.tie_embeddings=true"],
    "zero3": [*SHARDED3, "parallel.dp_shard=4"],
    "zero3, small parameters whole": [*ZERO3, "parallel.dp_shard=2"],
    "zero3, tied": [*SHARDED3, "model.tie_embeddings=true"],
    "zero3, tp2": [*SHARDED3, "parallel.tp=2", "parallel.dp_shard=2"],
    "zero3, cp2": [*SHARDED3, "parallel.cp=2", "parallel.dp_shard=1"],
    "zero3, replicas": [*SHARDED3, "parallel.dp_replicate=2", "parallel.dp_shard=2"],
    "zero3, parameters on the host": [*SHARDED3, "parallel.zero.offload_parameters=cpu", "parallel.dp_shard=2"],
    "zero3, recomputed": [*SHARDED3, "parallel.dp_shard=2", "parallel.recompute=full"],
    "zero3, selective": [*SHARDED3, "parallel.dp_shard=2", "parallel.recompute=selective"],
    "zero2, overlap": ["parallel.zero.stage=2", "+parallel.zero.extra.overlap_comm=true", "parallel.dp_shard=2"],
}
for stage in (1, 2):  # many buckets, and parameters larger than a bucket
    for key in ("extra.use_multi_rank_bucket_allreduce=false", "extra.allgather_bucket_size=100", "bucket_size=100"):
        changed = f"{'+' if key.startswith('extra') else ''}parallel.zero.{key}"
        LAYOUTS[f"zero{stage}, {key}"] = [f"parallel.zero.stage={stage}", changed, "parallel.dp_shard=2"]
QUICK = ("zero2",)


def outcome(ranks: Any, overrides: list[str], bug: str | None = None) -> TrialOutcome:
    """Return the outcome of the layout itself, without trying subsets of its axes."""
    asked = load("certify", CertifyConfig, ["model.num_layers=4", ZERO, "ranks=4", "steps=2", *overrides])
    trial, model = trials(asked)[0][-1], shrink(asked.model, asked.parallel)
    (found,) = compare_layouts(model, [trial], asked.steps, BuggyRanks(ranks, bug))
    return found


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_the_layout_is_certified(ranks, name):
    found = outcome(ranks, LAYOUTS[name])
    assert found.passed, found.failures()
    largest = {one.name: one.largest for one in found.comparisons}
    assert {"sgd: gradient norm", "adamw: updated weights", "bfloat16: gradients"} <= largest.keys()
    assert largest["bfloat16: gradient norm"] < 1e-6, "sums over micro-batches in bf16 are 1e-4 away"


BLAMED = {
    "averaged_by_deepspeed": (["parallel.dp_shard=2"], "sgd: gradient"),
    "summed_in_the_models_format": (["parallel.dp_shard=2"], "bfloat16: gradient"),
    "buffers_shifted_by_one": (["parallel.dp_shard=2"], "sgd: "),
    "copies_of_the_old_weights": (["parallel.dp_shard=2"], "checkpoint under the layout: "),
    "experts_reduced_with_the_dense": (["parallel.ep=2"], "could not save"),  # half of the experts have no owner
    "averaged_in_buckets": (SHARDED3, "sgd: gradient"),
    "shards_rounded_to_the_models_format": (SHARDED3, "bfloat16: gradient"),
    "micro_batches_overwritten": (SHARDED3, "sgd: gradient"),
    "shards_of_the_rank_before": (SHARDED3, "sgd: "),
    "whole_copies_of_the_old_weights": (ZERO3, "sgd: loss"),
}
QUICKLY_CAUGHT = ("summed_in_the_models_format",)


@pytest.mark.parametrize("bug", [b if b in QUICKLY_CAUGHT else pytest.param(b, marks=pytest.mark.slow) for b in BLAMED])
def test_a_bug_is_caught(ranks, bug):
    overrides, figure = BLAMED[bug]
    found = outcome(ranks, overrides, bug)
    assert not found.passed and any(figure in line for line in found.failures()), found.failures()


Blocks = list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]


def losses_and_state(root: Path, overrides: list[str], count: int) -> tuple[list[float], Blocks, Blocks]:
    """Return the losses of the next `count` steps, and this rank's state before and after them. In ZeRO-1 and 2, the
    state before includes the model's own parameters, as `copy.NAME`.
    """
    run = trainer(root, "run", [*overrides, "training.steps=12"])
    before = blocks_of(run)
    if isinstance(run.engine, ZeroEngine) and run.engine.stage < 3:
        for name, parameter in run.engine.placed.model.named_parameters():
            spec = run.engine.placed.specs[name]
            shape, offset = tuple(spec.info.shape), spec.compute_block.offset
            before.append((f"copy.{name}", shape, offset, parameter.detach().clone()))
    losses = [run.train_step(step).loss.item() for step in range(run.step, run.step + count)]
    run.save()
    run.checkpointer.wait()
    return losses, before, blocks_of(run)


def blocks_of(run: Any) -> Blocks:
    return [(part.name, part.shape, part.offset, part.tensor.clone()) for part in run.engine.state()]


def assembled(ranks: list[Blocks]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, shape, offset, part in (block for rank in ranks for block in rank):
        whole = found.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64))
        place = tuple(slice(o, o + s) for o, s in zip(offset, part.shape, strict=True))
        same = whole[place].isnan() | (whole[place] == part)
        assert same.all(), f"{name}: two ranks that have the same block differ"
        whole[place] = part.double()
    assert not any(whole.isnan().any() for whole in found.values()), "no element is missing"
    return found


MOE = (
    (2, ["parallel.ep=2"]),
    (4, [ZERO, "parallel.zero.stage=2", "parallel.tp=2", "parallel.ep=2"]),
    (4, [ZERO, "parallel.dp_replicate=2", "parallel.ep=2"]),
    (2, [ZERO, "parallel.pp=2", "parallel.dp_shard=1", "training.micro_batch_size=1"]),
    (1, [ZERO]),
    (1, []),
)
DENSE = (
    (2, ["model.moe_every=0"]),
    (4, [ZERO, *SHARDED3, "parallel.tp=2"]),
    (2, [ZERO, *ZERO3, "training.micro_batch_size=1"]),
    (1, ["model.moe_every=0"]),
)


@pytest.mark.slow
@pytest.mark.parametrize("places", [MOE, DENSE], ids=["moe", "dense"])
def test_a_run_moves_between_engines_and_world_sizes(ranks, small_corpus, tmp_path, places):
    """A move keeps weights, moments and step counts bit for bit. The losses are those of a run that never moved."""
    usual = [*small_corpus, "precision=fp32", "optimizer=adamw", "optimizer.lr=1e-3"]
    stayed = ranks(1, losses_and_state, tmp_path / "stayed", [*usual, *places[-1][1]], 2 * len(places))[0][0]
    losses: list[float] = []
    kept: dict[str, torch.Tensor] = {}
    for size, how in places:
        found = ranks(size, losses_and_state, tmp_path / "moved", [*usual, *how], 2)
        before = assembled([rank[1] for rank in found])
        copies = {name.removeprefix("copy."): before.pop(name) for name in list(before) if name.startswith("copy.")}
        assert bool(copies) == (ZERO in how and not {*ZERO3} <= {*how})
        assert all(torch.equal(copy, before[f"model.{name}"]) for name, copy in copies.items()), "every rank's experts"
        if kept:
            torch.testing.assert_close(before, kept, rtol=0, atol=0)
        kept = assembled([rank[2] for rank in found])
        assert float(kept["optimizer.head.weight.step"]) == len(losses) + 2
        losses += found[0][0]
    assert losses == pytest.approx(stayed, abs=5e-6)


def assert_kept_bytes(root: Path, overrides: list[str]) -> None:
    run = trainer(root, "run", overrides)
    formula = static_bytes(run.config.model, run.config.precision, run.meshes.layout, torch.float32, run.world.rank)
    state = sum(part.tensor.nbytes for part in run.engine.state() if part.shape and ".balance." not in part.name)
    assert sum(parameter.nbytes for parameter in run.engine.placed.model.parameters()) == formula.parameters
    assert state == pytest.approx(formula.optimizer, rel=0.05)


def test_kept_bytes_equal_the_formulas(ranks, small_corpus, tmp_path):
    usual = [*small_corpus, "precision=bf16", "optimizer=adamw", ZERO, "parallel.ep=2"]
    ranks(4, assert_kept_bytes, tmp_path, usual)


def offloaded(root: Path, overrides: list[str]) -> tuple[list[float], tuple[bool, bool]]:
    """Return three losses, whether all state is on disk, and whether all shards are in DeepSpeed's host memory."""
    run = trainer(root, "run", [*overrides, "training.steps=6"])
    losses = [run.train_step(step).loss.item() for step in range(run.step, run.step + 3)]
    run.save()
    run.checkpointer.wait()
    zero = run.engine.zero
    wrappers = [zero] if run.engine.stage == 3 else [wrapper for _, wrapper in zero.wrappers]
    address = lambda tensor: tensor.untyped_storage().data_ptr()  # noqa: E731
    memory = map(address, zero.wrapper.param_groups_fp16_flat_cpu_memory if run.engine.stage == 3 else ())
    shards = {address(getattr(parameter, "ds_tensor", parameter)) for parameter in run.engine.placed.model.parameters()}
    return losses, (all(isinstance(one.optimizer, PagedAdamW) for one in wrappers), shards <= set(memory))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [[], SHARDED3], ids=["1", "3"])
def test_offloaded_state_is_the_same_state(ranks, small_corpus, tmp_path, stage):
    """Offload masters and moments to the host or to disk; in stage 3 also parameters, alone or with the masters."""
    usual = [*small_corpus, "precision=bf16", "optimizer=adamw", "optimizer.lr=1e-3", ZERO, *stage]
    disk, host = tmp_path / "disk", "parallel.zero.offload=cpu"
    places = {"host": [host], "nvme": ["parallel.zero.offload=nvme", f"parallel.zero.nvme={disk}"]}
    if stage:
        shards = "parallel.zero.offload_parameters=cpu"
        places |= {"parameters": [shards], "parameters-host": [shards, host]}
    for _ in range(2):  # the second time, resume from a checkpoint
        wanted = [losses for losses, _ in ranks(2, offloaded, tmp_path / "device", usual)]
        for name, there in places.items():
            found = ranks(2, offloaded, tmp_path / name, [*usual, *there])
            assert [losses for losses, _ in found] == wanted
            assert [where for _, where in found] == [(name == "nvme", "parameters" in name)] * 2
    assert not list(disk.iterdir()), "no file is left behind"


def assert_missing_gradient_raises(root: Path, overrides: list[str]) -> None:
    engine = trainer(root, "run", overrides).engine
    with pytest.raises(ValueError, match=r"^embedding\.weight has no gradient"):
        engine.after_backward(True)
        engine.complete_gradients()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_missing_gradient_is_an_error(ranks, small_corpus, tmp_path, stage):
    usual = [*small_corpus, "precision=fp32", "optimizer=adamw", ZERO, f"parallel.zero.stage={stage}"]
    ranks(2, assert_missing_gradient_raises, tmp_path, usual)


PADDED = ["model.hidden_size=9", "training.global_batch_size=8"]  # the last of 4 ranks has none of a gain's 9 elements


def read_between_steps(root: Path, overrides: list[str]) -> tuple[list[float], list[torch.Tensor]]:
    """Compute logits before each of three steps. Return the losses and the logits."""
    run = trainer(root, "run", overrides)
    placed, tokens_BT = run.engine.placed, torch.arange(48)[None]
    losses, logits = [], []
    for step in range(3):
        logits.append(placed.outputs(tokens_BT, placed.sequence_context(torch.arange(48)[None])))
        losses.append(run.train_step(step).loss.item())
    if isinstance(run.engine, ZeroEngine):
        with pytest.raises(ValueError, match="has no gradient"):
            run.engine.complete_gradients()
    return losses, logits


@pytest.mark.parametrize(
    "size, how",
    [
        (2, []),
        pytest.param(1, [], marks=pytest.mark.slow),
        pytest.param(3, ["training.micro_batch_size=1"], marks=pytest.mark.slow),
        pytest.param(4, PADDED, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_model_can_be_read_at_any_time(ranks, small_corpus, tmp_path, size, how):
    """On three ranks, no tensor is divided evenly, and dividing by the number of ranks is not exact."""
    usual = [*small_corpus, "precision=fp32", "model.moe_every=0", "training.global_batch_size=6", *how]
    ((losses, logits),) = ranks(1, read_between_steps, tmp_path / "torch", usual)
    for found in ranks(size, read_between_steps, tmp_path / "zero", [*usual, ZERO, *SHARDED3]):
        assert found[0] == pytest.approx(losses, abs=1e-6)
        for one, wanted in zip(found[1], logits, strict=True):
            torch.testing.assert_close(one, wanted, atol=2e-5, rtol=0)


def left_behind(root: Path, overrides: list[str], honest: bool) -> int:
    """Return the number of modules whose forward pass DeepSpeed regards as unfinished after a step."""

    class Kept(list[Any]):
        def clear(self) -> None:
            pass

    run, stack = trainer(root, "run", overrides), [] if honest else Kept()
    with patch("deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK", stack):
        run.train_step(0)
    return len(stack)


@pytest.mark.slow
@pytest.mark.parametrize("honest", [True, False])
def test_recomputation_leaves_no_modules_behind(ranks, small_corpus, tmp_path, honest):
    usual = [*small_corpus, "precision=fp32", ZERO, *SHARDED3, "parallel.recompute=full"]
    assert all((left == 0) == honest for left in ranks(2, left_behind, tmp_path, usual, honest))


def test_initial_weights_are_exact_when_sharded(ranks, small_corpus, tmp_path):
    sizes = ["model.moe_every=0", "training.global_batch_size=6", "training.micro_batch_size=1"]
    usual, found = [*small_corpus, "precision=bf16", *sizes], []
    for count, own in ((3, [ZERO, *SHARDED3]), (1, [])):
        results = ranks(count, losses_and_state, tmp_path / str(count), [*usual, *own], 0)
        found.append(assembled([before for _, before, _ in results]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def kept_alive(root: Path, overrides: list[str], honest: bool) -> tuple[int, int]:
    """Return how many gathered matrices the autograd graph keeps after a forward pass, and how many were gathered."""
    if not honest:
        zero3.Zero3._pack = lambda self, tensor: tensor.detach()  # type: ignore[method-assign]
    placed = trainer(root, "run", overrides).engine.placed
    seen: list[weakref.ref[torch.UntypedStorage]] = []
    for module in placed.model.modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(lambda m, _: seen.append(weakref.ref(m.weight.untyped_storage())))
    logits = placed.model(torch.arange(48)[None], placed.sequence_context(torch.arange(48)[None]))
    patience = time.monotonic() + 2.0
    while (kept := sum(one() is not None for one in seen)) and time.monotonic() < patience:
        time.sleep(0.01)  # gloo's own thread frees the last result later
    assert logits.requires_grad and sum(p.numel() for p in placed.model.parameters()) == 0
    return kept, len(seen)


@pytest.mark.slow
@pytest.mark.parametrize("honest", [True, False])
def test_the_graph_keeps_no_whole_matrix(small_corpus, tmp_path, honest):
    """Use a separate pool, since the planted bug stays in its processes."""
    few = [f"+parallel.zero.extra.stage3_{key}=0" for key in ("max_reuse_distance", "prefetch_bucket_size")]
    with closing(Pool()) as pool:
        found = pool(2, kept_alive, tmp_path, [*small_corpus, "precision=fp32", ZERO, *SHARDED3, *few], honest)
    assert all(seen > 20 and (kept == 0 if honest else kept > seen // 2) for kept, seen in found), found


def test_paged_adamw_is_adamw_and_frees_its_memory(tmp_path):
    size = CHUNK * 2 + 12345
    torch.manual_seed(0)
    start, options = torch.randn(size), {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    plain, paged = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    usual = torch.optim.AdamW([plain], fused=True, **options)
    ours = PagedAdamW([{"params": [paged], **options}], {})
    ours.page(tmp_path)
    for step in range(3):
        for one, optimizer in ((plain, usual), (paged, ours)):
            one.grad = torch.linspace(-1, 1, size) * (step + 1)
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(ours.state[paged][key], usual.state[plain][key]), key
    assert torch.equal(paged, plain)
    ours.release()
    assert resident_kb(tmp_path) == 0
    paged.sum()
    assert resident_kb(tmp_path) > size * 4 // 1024 * 0.9, "the control"


def resident_kb(folder: Path) -> int:
    """Return the KiB of this process's resident memory that maps files in `folder`, even unlinked files."""
    maps = psutil.Process().memory_maps()
    return sum(one.rss for one in maps if one.path.startswith(str(folder))) // 1024


@pytest.mark.parametrize("shape", [(5,), (3, 4), (1, 7), (2, 3, 4), (2, 2, 3, 2)])
def test_a_range_is_few_blocks(shape):
    whole = torch.arange(torch.Size(shape).numel())
    for start in range(len(whole) + 1):
        for stop in range(start, len(whole) + 1):
            joined, count = [], 0
            for block in zero12.blocks(ShardBlock((0,) * len(shape), shape), start, stop):
                place = tuple(slice(o, o + s) for o, s in zip(block.offset, block.shape, strict=True))
                joined += whole.view(shape)[place].flatten().tolist()
                count += 1
            assert joined == list(range(start, stop)) and count <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optimizer=muon"], r"optimizer.kind=muon: needs whole matrices.*fsdp2"),
        (["precision=fp64"], r"precision.*keeps master weights in fp32, not float64"),
        (["parallel.pp=2", "parallel.zero.stage=2", "parallel.dp_shard=1"], r"zero.stage=2: .*pipeline.*try 1"),
        (["parallel.zero.stage=3"], r"zero.stage=3: does not support routed experts; parallel.engine=fsdp2"),
        ([*ZERO3, "parallel.compile=true"], r"parallel.compile=true: .*stage 3; parallel.engine=fsdp2"),
        ([*ZERO3, "precision=fp8"], r"zero.stage=3: FP8 is untested.*parallel.engine=fsdp2"),
        ([*ZERO3, "+parallel.zero.extra.overlap_comm=true"], r"extra.overlap_comm.*does not apply to stage 3"),
        (["parallel.zero.offload_parameters=cpu"], r"zero.offload_parameters=cpu: .*whole on every rank.*try none"),
        (["parallel.zero.stage=7"], r"zero.stage=7: there are stages 1, 2 and 3"),
        (["parallel.reduce_dtype=bfloat16"], r"parallel.reduce_dtype.*fp32"),
        (["parallel.zero.offload=nvme"], r"zero.nvme.*name a directory"),
        (["parallel.zero.nvme=/tmp"], r"zero.nvme=/tmp: needs"),
        (["parallel.zero.offload=nvme", "parallel.zero.nvme=/dev/null"], r"zero.nvme=/dev/null: is not a directory"),
        (["+parallel.zero.extra.round_robin_gradients=true"], r"extra.round_robin_gradients.*set by Leviathan"),
        (["parallel.zero.offload=nvme", "parallel.zero.nvme=/tmp", "optimizer=sgd"], r"zero.offload.*AdamW"),
        (["+parallel.zero.extra.buckets=1"], r"extra.buckets=1: no such key"),
        (["+parallel.zero.extra.allgather_bucket_size=many"], r"extra.allgather_bucket_size=many: .*integer"),
    ],
)
def test_unsupported_configurations_are_rejected(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(load("train", TrainConfig, ["hparam=none", ZERO, *overrides]), 2)


def test_another_version_is_rejected_with_the_install_line(monkeypatch):
    run = load("train", TrainConfig, [ZERO])
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    check(run, 2)
    assert "DS_ACCELERATOR" not in os.environ, "a submitted job inherits it, and may run on GPUs"
    for found in (None, "0.17.0"):
        monkeypatch.setattr(zero12, "installed", lambda found=found: found)
        with pytest.raises(ConfigError, match=rf"deepspeed.*pip install 'leviathan\[deepspeed\]'.*{VERSION}"):
            check(run, 2)


def test_a_file_is_closed_with_its_tensor_and_on_a_full_disk(tmp_path):
    handles = len(os.listdir("/proc/self/fd"))
    one = MappedFile(tmp_path, 1000)
    assert len(os.listdir("/proc/self/fd")) > handles, "the control"
    del one
    with pytest.raises(ConfigError, match=r"zero.nvme=.*no space for"):
        MappedFile(tmp_path, 1 << 50)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == handles and not list(tmp_path.iterdir())


def test_the_pin_is_the_one_that_is_declared():
    text = (Path(zero12.__file__).parents[2] / "pyproject.toml").read_text()
    assert text.count(f'"deepspeed=={VERSION}"') == 2


@pytest.mark.slow
def test_the_table_of_the_guide_is_current():
    assert engines.BEGIN + engines.table() + engines.END in engines.PAGE.read_text()
    assert not engines.supported([*engines.ENGINES["ZeRO-1"], "optimizer=muon"]), "the control"
