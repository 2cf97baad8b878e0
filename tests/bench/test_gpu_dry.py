"""Run the GPU benchmarks without a GPU, every section with tiny shapes, and check that failures are reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench.gpu.__main__ import SECTIONS, in_new_process, main, measure
from bench.gpu.clock import Timing
from bench.gpu.context import DENSE, PLAIN, TRITON, Bench
from bench.gpu.record import BenchRecord, BenchRow, judged, tables
from bench.gpu.shapes import MAVERICK, counts, moe_shapes
from model.kernels import TorchKernels
from precision.config import KernelKind
from precision.native_gemm import NativeGemm
from tests.conftest import ROOT

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
    """Omit the section `layers`: it imports the libraries that it compares with."""
    out = tmp_path / "gpu.json"
    names = [name for name in SECTIONS if name != "layers"]
    command = [sys.executable, "-c", WITHOUT, "--dry", "--out", str(out), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "these figures are meaningless" in done.stdout and "(DRY)" in done.stdout
    found = json.loads(out.read_text())
    assert found["schema"] == 1 and found["dry"] is True and found["machine"]["torch"] == torch.__version__
    assert {row["section"] for row in found["rows"]} == set(names)
    assert not [row for row in found["rows"] if "failed" in row or "holds" in row]
    timed = [row for row in found["rows"] if "ms" in row]
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

    monkeypatch.setattr("model.layers.kernels_for", made)
    monkeypatch.setattr("model.moe.kernels_for", made)
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
    sides = [row.side for row in rows if row.section == "step" and row.ms and row.load]
    assert sides[:2] == [PLAIN, by_triton] and sides[2:] in ([float8], [float8 + TRITON])


@pytest.mark.parametrize("section", ["grouped", "layers"])
def test_wrong_results_are_not_timed(monkeypatch, section):
    right = NativeGemm.linear
    monkeypatch.setattr(NativeGemm, "linear", lambda gemm, x, w, groups=None: right(gemm, x, w, groups) * 1.05)
    first = next(row for row in measure(section, bench()) if row.side == PLAIN)
    assert first.failed and first.failed.startswith("wrong: ") and first.ms is None


def test_an_exception_is_a_row_and_the_rest_runs(monkeypatch, tmp_path, capsys):
    def broken(*given: object) -> None:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr("bench.gpu.attention.attend", broken)
    out = tmp_path / "gpu.json"
    assert main(["--dry", "--out", str(out), "attention", "ceilings"]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert {row.get("failed") for row in rows if row["section"] == "attention"} == {"RuntimeError: no such kernel"}
    assert any("ms" in row for row in rows if row["section"] == "ceilings")
    assert "FAILED: RuntimeError: no such kernel" in capsys.readouterr().out


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
