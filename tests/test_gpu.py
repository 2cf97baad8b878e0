"""Tests that need a GPU (`make test-gpu`). Without a GPU they fail; they are not skipped."""

from __future__ import annotations

import json

import pytest
import torch

from launch.cli import main
from model.attention.segments import SegmentRun, attend_segments, document_bounds, plan_segments
from model.kernels import TorchKernels, TritonKernels
from tests.model.attention.test_segments import figures, inputs, largest, positions
from tests.support.kernels.kernel_cases import BREAKS, CASES, GATES, Case, results
from tests.support.kernels.kernel_cases import figures as kernel_figures
from tests.support.tiny import TINY

pytestmark = pytest.mark.gpu


def run(root, name, *overrides) -> dict:
    assert torch.cuda.is_available(), "make test-gpu needs a GPU"
    assert main(["train", *TINY, f"run.root={root}", f"run.name={name}", *overrides]) == 0
    return json.loads((root / name / "metrics.jsonl").read_text().splitlines()[-2])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_training_on_a_gpu(tmp_path, small_corpus, precision):
    line = run(tmp_path, "run", *small_corpus, f"precision={precision}", "checkpoint.every=2")
    assert line["step"] == 6 and line["loss"] < 6.0 and line["peak_memory_bytes"] < 2**30


def test_a_gpu_computes_what_a_cpu_computes(tmp_path, small_corpus, monkeypatch):
    exact = [*small_corpus, "precision=fp64", "optimizer=sgd", "training.clip_norm=null"]
    on_gpu = run(tmp_path, "gpu", *exact)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", *TINY, f"run.root={tmp_path}", "run.name=cpu", *exact]) == 0
    on_cpu = json.loads((tmp_path / "cpu" / "metrics.jsonl").read_text().splitlines()[-2])
    for key in ("loss", "gradient_norm"):
        assert on_gpu[key] == pytest.approx(on_cpu[key], rel=1e-9)


@pytest.mark.parametrize("dtype, gate", [("bfloat16", 0.1), ("float32", 1e-4), ("float64", 1e-12)])
def test_attention_in_pieces_on_a_gpu(dtype, gate):
    """Compare flash kernels (in bfloat16) and blocked matmuls (in other formats) with the CPU in float64."""
    rows, runs = positions(64), [SegmentRun(0, 40, 0), SegmentRun(40, 64, 40)]
    parts = plan_segments(document_bounds(rows == 0), runs, runs)

    def computed(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return figures(lambda q, k, v: attend_segments(q, k, v, parts), *tensors)

    exact = inputs(64)
    found = computed(*(x.to("cuda", getattr(torch, dtype)) for x in exact))
    assert largest([x.cpu().double() for x in found], computed(*exact)) < gate


@pytest.mark.parametrize("kernels", [TorchKernels, TritonKernels])
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_a_gpu(name, kernels):
    """Compare PyTorch's and Triton's kernels with the plain reference on the CPU in float64."""
    found = kernel_figures(CASES[name], kernels(), "cuda")
    assert {key: error for key, error in found.items() if error > GATES[CASES[name].dtype]} == {}


@pytest.mark.parametrize("what", BREAKS)
def test_the_comparison_of_kernels_notices_on_a_gpu(what):
    assert max(kernel_figures(CASES["top-2, padded"], TritonKernels(), "cuda", what).values()) > 0.1


def test_kernels_do_the_same_twice():
    """The case is so large that the order of Triton's programs varies. No sum may depend on that order."""
    case = Case("bfloat16", 512, 1536, 4, 16, experts=64)
    first, again = (results(case, TritonKernels(), torch.bfloat16, "cuda") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_run_on_a_gpu_goes_on(tmp_path, small_corpus):
    whole = run(tmp_path, "whole", *small_corpus, "precision=bf16", "parallel.recompute=selective")
    first = [*small_corpus, "precision=bf16", "parallel.recompute=selective", "checkpoint.every=3"]
    run(tmp_path, "cut", *first)
    (tmp_path / "cut" / "summary.json").unlink()
    for path in (tmp_path / "cut" / "checkpoints" / "step-00000006").iterdir():
        path.unlink()
    again = run(tmp_path, "cut", *first)
    assert again["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_compiled_layers_on_a_gpu(tmp_path, small_corpus):
    plain = run(tmp_path, "plain", *small_corpus, "precision=fp32")
    compiled = run(tmp_path, "compiled", *small_corpus, "precision=fp32", "parallel.compile=true")
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_nccl_with_one_rank():
    """On one GPU, check only that NCCL is present and completes an all-reduce and an all-to-all."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        sent = torch.arange(4.0, device="cuda")
        dist.all_reduce(sent)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        assert received.tolist() == [0.0, 1.0, 2.0, 3.0]
    finally:
        dist.destroy_process_group()


def test_the_smoke_model_learns_on_a_gpu(tmp_path):
    assert main(["train", "experiment=smoke", f"run.root={tmp_path}", "run.name=smoke", "precision=bf16"]) == 0
    summary = json.loads((tmp_path / "smoke" / "summary.json").read_text())
    assert summary["heldout_loss"] < summary["bigram_loss"] < summary["unigram_loss"]
