"""Run the GPU benchmarks without a GPU, every section with tiny shapes, and check that failures are reported."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from bench.gpu import checks, split
from bench.gpu.__main__ import SECTIONS, in_new_process, main, measure
from bench.gpu.attention import attention, flex
from bench.gpu.clock import Timing, distance
from bench.gpu.context import DENSE, PLAIN, TRITON, Bench
from bench.gpu.documents import count, packed_flops, packed_positions
from bench.gpu.head import CHUNKED, WHOLE
from bench.gpu.record import BenchRecord, BenchRow, judged, tables
from bench.gpu.shapes import MAVERICK, counts, moe_shapes
from bench.gpu.split import KernelClass, class_of, divided, launched
from bench.gpu.training import TINY, Training
from data.loader import Batch
from model import head
from model.flops import training_flops
from model.kernels import TorchKernels
from model.load_balance import Balancer
from parallel.layout import Layout
from parallel.mesh import meshes_of_rank
from parallel.parallelize import build
from precision.config import Compute, KernelKind, PrecisionConfig
from precision.native_gemm import NativeGemm
from tests.conftest import ROOT
from tests.model.attention.test_segments import inputs, masked, positions
from train.engine.base import optimizer_step
from train.engine.fsdp import TorchEngine
from train.optim.config import Moments, OptimizerConfig

HIDDEN = ("hydra", "omegaconf", "datasets", "wandb", "pyarrow", "tokenizers", "tiktoken", "matplotlib", "xxhash")
HIDDEN += ("transformers", "torchtitan")
WITHOUT = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(f"this machine has no {{name}}", name=name)
sys.meta_path.insert(0, Hide())
from bench.gpu.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def bench(seconds: float = 600) -> Bench:
    return Bench(torch.device("cpu"), True, time.monotonic() + seconds)


def test_sections_run_with_torch_alone(tmp_path):
    """Omit two sections: `layers` imports the libraries that it compares with, `tests` needs what tests need."""
    out = tmp_path / "gpu.json"
    names = [name for name in SECTIONS if name not in ("layers", "tests")]
    command = [sys.executable, "-c", WITHOUT, "--dry", "--out", str(out), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "these figures are meaningless" in done.stdout and "(DRY)" in done.stdout
    found = json.loads(out.read_text())
    assert found["schema"] == 1 and found["dry"] is True and found["machine"]["torch"] == torch.__version__
    assert {row["section"] for row in found["rows"]} == set(names)
    assert not [row for row in found["rows"] if "failed" in row or "holds" in row]
    timed = [row for row in found["rows"] if "ms" in row and row["phase"] != "split"]
    assert len(timed) > 40 and all(row["ms"] > 0 and row["name"] and row["side"] and row["phase"] for row in timed)
    for section in ("dense", "grouped", "step", "loss"):
        sides = {row["side"] for row in found["rows"] if row["section"] == section}
        assert {PLAIN, "emulated blockwise"} <= sides


def test_layers_beside_their_peers():
    rows = list(measure("layers", bench()))
    assert not [row for row in rows if row.failed]
    ratios = {(row.side, row.against) for row in rows if row.ratio is not None}
    assert {against for _, against in ratios} >= {"transformers Qwen3 grouped", "transformers Mixtral grouped", PLAIN}
    assert (PLAIN, DENSE) in ratios
    missing = [row.missing for row in rows if row.side == PLAIN + TRITON]
    assert missing == ["Triton's kernels run on GPUs only"]


def test_triton_is_compared_if_available(monkeypatch):
    """Replace Triton's kernels by PyTorch's, so that the comparisons run on a CPU."""
    asked = []

    def made(kind: KernelKind) -> TorchKernels:
        asked.append(kind)
        return TorchKernels()

    for module in ("layers", "moe", "attention.layer"):
        monkeypatch.setattr(f"model.{module}.kernels_for", made)
    for module in ("bench.gpu.context", "precision.resolve"):
        monkeypatch.setattr(f"{module}.no_triton", lambda device: None)
    monkeypatch.setattr("bench.gpu.layers.GROUPED", {})
    monkeypatch.setattr("bench.gpu.layers.moe_shapes", lambda *given: moe_shapes(*given)[-1:])
    rows = [row for section in ("layers", "step") for row in measure(section, bench())]
    assert set(asked) == {KernelKind.torch, KernelKind.triton} and not [
        row for row in rows if row.failed or row.missing
    ]
    ratios = {(row.side, row.against) for row in rows if row.ratio is not None}
    float8, by_triton = "emulated blockwise", PLAIN + TRITON
    assert ratios >= {(by_triton, PLAIN), (by_triton, DENSE + TRITON), (float8 + TRITON, by_triton), (float8, PLAIN)}
    steps = [row for row in rows if row.phase == "step" and row.ms and row.load]
    sides = [row.side for row in steps]
    assert sides[:4] == [PLAIN, *[by_triton] * 3] and sides[4:] in ([float8], [float8 + TRITON])
    assert [row.load for row in steps] == ["balanced", "balanced", "routed", "balanced", "balanced"]
    assert {row.side for row in rows if row.floor == 300} == {by_triton}, "floors are those of the default kernels"


@pytest.mark.parametrize("section", ["grouped", "layers"])
def test_wrong_results_are_not_timed(monkeypatch, section):
    right = NativeGemm.linear
    monkeypatch.setattr(NativeGemm, "linear", lambda gemm, x, w, groups=None: right(gemm, x, w, groups) * 1.05)
    first = next(row for row in measure(section, bench()) if row.side == PLAIN)
    assert first.failed and first.failed.startswith("wrong: ") and first.ms is None


def test_an_exception_is_a_row_and_the_rest_runs(monkeypatch, tmp_path, capsys):
    def broken(*given: object) -> None:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr("bench.gpu.attention.local_attention", broken)
    out = tmp_path / "gpu.json"
    assert main(["--dry", "--out", str(out), "attention", "ceilings"]) == 1
    rows = json.loads(out.read_text())["rows"]
    attention = [row for row in rows if row["section"] == "attention" and row.get("side") != "varlen"]
    assert attention and {row.get("failed") for row in attention} == {"RuntimeError: no such kernel"}
    assert any("ms" in row for row in rows if row["section"] == "ceilings")
    assert "FAILED: RuntimeError: no such kernel" in capsys.readouterr().out


def test_the_tests_come_first(monkeypatch):
    """A run of the tests is faked: one failed, one passed."""

    def fake(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        (path,) = (one.partition("=")[2] for one in command if one.startswith("--junitxml="))
        case = '<testcase name="test_heads[bf16]"><failure message="AssertionError: 0.1\nmore"/></testcase>'
        Path(path).write_text(f'<testsuites><testsuite>{case}<testcase name="test_norm"/></testsuite></testsuites>')
        return subprocess.CompletedProcess(command, 1, "F.\n1 failed, 1 passed in 1s\n", "")

    assert next(iter(SECTIONS)) == "tests"
    monkeypatch.setattr(checks.subprocess, "run", fake)
    failed, total = measure("tests", Bench(torch.device("cpu"), False, time.monotonic() + 60))
    assert (failed.name, failed.failed) == ("test_heads[bf16]", "AssertionError: 0.1 more")
    assert total.failed == "pytest ended with 1" and total.note == "1 failed, 1 passed in 1s"


@pytest.mark.slow
def test_a_dry_run_collects_the_tests():
    (row,) = measure("tests", bench())
    assert row.failed is None and "tests collected" in row.note


def test_jobs_without_time_are_reported():
    rows = list(measure("ceilings", bench(seconds=-1)))
    assert rows and all(row.missing == "time: raise --minutes" and row.ms is None for row in rows)


def test_a_section_in_a_new_process(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    record = BenchRecord(tmp_path / "gpu.json", dry=True)
    rows = list(in_new_process("ceilings", 100, record))
    assert record.machine["torch"] == torch.__version__ and sum(row.ms is not None for row in rows) == 3
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (row,) = in_new_process("ceilings", 100, record)
    assert row.failed == "its process ended with 1"


def test_a_missing_gpu_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "needs a GPU" in said.err and not said.out


def test_goals_from_both_sides():
    layer = BenchRow("layers", "layer", "bf16", ms=10.0, flops=4.0e12, floor=450.0, moonshot=600.0)
    assert judged(layer, dry=False).tflops == pytest.approx(400) and judged(layer, dry=False).holds is False
    assert judged(layer, dry=True).holds is None
    tax = BenchRow("layers", "layer", "bf16", ratio=1.2, floor=1.3, moonshot=1.12, at_most=True)
    assert judged(tax, dry=False).holds is True
    assert "<= 1.3" in tables([judged(tax, dry=False)], {}, dry=False)
    a, b = Timing([2.0, 4.0, 9.0]), Timing([1.0, 1.0, 3.0])
    assert a.over(b) == 3.0 and a.ms == 4.0


def test_rows_of_experts():
    balanced, zipf = (counts(4096, 128, load) for load in ("balanced", "zipf"))
    assert (balanced == 32).all() and zipf.sum() == 4096 and not (zipf % 32).any()
    assert zipf.max() > 500 and zipf.min() == 0


def test_maverick_has_as_many_experts_as_fit():
    experts = {memory: moe_shapes(False, memory << 30)[-1].experts for memory in (40, 80, 141)}
    assert experts == {40: 32, 80: 64, 141: MAVERICK.experts}


def test_documents_are_packed_and_counted():
    positions = packed_positions(3, 8192)
    lengths = [len(run) for row in positions.tolist() for run in _runs(row)]
    assert sum(lengths) == 3 * 8192 and count(positions) == len(lengths) > 10
    assert max(lengths) / statistics.median(lengths) > 5 and min(lengths) < 200
    assert torch.equal(positions, packed_positions(3, 8192)) and not torch.equal(positions[0], positions[1])
    reach = sum(length**2 for length in lengths) / sum(lengths)
    attention = packed_flops(TINY, positions) - training_flops(TINY, 64).matrices
    assert attention == pytest.approx(6 * reach * TINY.num_layers * TINY.num_heads * TINY.head_dim)
    whole = torch.arange(64)[None]
    assert packed_flops(TINY, whole) == training_flops(TINY, 64).total
    chunked = replace(TINY, attention_chunk_size=16)
    assert packed_flops(chunked, whole) == training_flops(chunked, 64).total
    halves = torch.arange(32).repeat(2)[None]
    assert packed_flops(TINY, halves) == training_flops(TINY, 32).total


def _runs(row: list[int]) -> list[list[int]]:
    starts = [place for place, position in enumerate(row) if position == 0]
    return [row[begin:end] for begin, end in pairwise([*starts, len(row)])]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_same_keys():
    parts, (q, k, v, _) = (positions(64) == 0).cumsum(1), inputs(64, torch.float32)
    with torch.no_grad():
        assert distance(flex(parts)(q, k, v), masked(positions(64))(q, k, v)) < 1e-6
        assert distance(flex(parts.roll(1, 1))(q, k, v), masked(positions(64))(q, k, v)) > 1e-2


NAMES = {
    "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, cutlass::bfloat16_t>>": KernelClass.attention,
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128": KernelClass.attention,
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": KernelClass.products,
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<GroupedGemm>>": KernelClass.products,
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": KernelClass.products,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": KernelClass.products,
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": KernelClass.communication,
    "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel>": KernelClass.elementwise,
    "void at::native::radixSortKVInPlace<-2, -1, 32, 4, long, long, unsigned int>": KernelClass.elementwise,
    "heads_backward": KernelClass.elementwise,
    "Memcpy DtoD (Device -> Device)": KernelClass.elementwise,
}


def test_kernels_are_divided_into_classes():
    assert {name: class_of(name) for name in NAMES} == NAMES
    spans = [("gemm", 0.0, 4.0), ("ncclAllReduce", 2.0, 6.0), ("add", 7.0, 8.0), ("Memcpy HtoD", 8.0, 8.5)]
    found = divided(spans, wall_ms=10.0)
    assert [found[kind] for kind in KernelClass] == [0.0, 4.0, 4.0, 1.5, 2.5]
    assert launched(spans) == 3


def test_a_trace_of_a_run_is_divided(tmp_path, capsys):
    kernels = [("kernel", "gemm", 1e3, 4e3), ("kernel", "add", 6e3, 1e3), ("gpu_memcpy", "Memcpy DtoD", 7e3, 1e3)]
    events = [{"ph": "X", "cat": c, "name": n, "ts": t, "dur": d} for c, n, t, d in kernels]
    events += [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 10e3}, {"ph": "M", "name": "x"}]
    path = tmp_path / "step.trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    split.main([str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("step.trace.json: 10.0 ms, 3 launches")
    assert [line.split() for line in lines[3:]] == [
        ["products", "4.00", "ms", "40.0%"], ["elementwise", "2.00", "ms", "20.0%"], ["host", "4.00", "ms", "40.0%"],
    ]  # fmt: skip


def test_the_loss_is_compared_by_blocks(monkeypatch):
    monkeypatch.setattr("model.head._BLOCK_BYTES", 2 * 64 * 128)
    rows = list(measure("head", bench()))
    assert not [row for row in rows if row.failed]
    assert {row.against for row in rows if row.ratio} == {WHOLE, CHUNKED}
    honest = head._blocks
    monkeypatch.setattr(head, "_blocks", lambda *sizes: list(honest(*sizes))[1:])
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions")
    rows = list(measure("head", bench()))
    assert rows[0].failed and rows[1].missing


@pytest.mark.parametrize("version, kind", [("2.11.0+cu130", "segments"), ("2.13.0", "varlen")])
def test_the_attention_that_a_gpu_can_run_is_measured(monkeypatch, version, kind):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    here = Bench(torch.device("cuda"), False, time.monotonic() + 60)
    monkeypatch.setattr(Bench, "_recipes", [])
    assert here.precisions[PLAIN].attention.value == kind
    first = next(attention(here))
    lacking = [row.missing for row in first.measure()] if kind == "segments" else []
    assert (first.name == "varlen") is bool(lacking) and all("pip install 'torch>=2.12'" in line for line in lacking)


def test_the_step_is_that_of_the_engine():
    precision, optimizer = PrecisionConfig(Compute.float32), OptimizerConfig(lr=1e-2)
    training, other = (Training(TINY, precision, bench(), Moments.float32, lr=lr) for lr in (1e-2, 2e-2))
    placed = build(TINY, precision, meshes_of_rank(Layout(dp_shard=1), 0), torch.device("cpu"), seed=0)
    engine, balancer = TorchEngine(placed, optimizer), Balancer(placed.model)
    tokens, positions = torch.arange(4 * 33).view(4, 33) * 7 % TINY.vocab_size, packed_positions(4, 32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], positions, torch.zeros(4, dtype=torch.int64))
    for _ in range(3):
        wanted = optimizer_step(engine, balancer, batch, 2, 1.0, 1.0).loss
        found, different = (one.step(tokens, 2, positions) for one in (training, other))
        assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    for one, same in zip(training.placed.model.parameters(), placed.model.parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-6, atol=1e-7)
    assert float(different) != pytest.approx(float(wanted), rel=1e-4), "the control"
