"""MFU against figures made by hand."""

from __future__ import annotations

import pytest
import torch

from model.flops import PEAK_FLOPS, peak_flops, training_flops
from tests.support.models import small
from tests.support.tiny import trainer
from train.metrics import Throughput

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H20", None),
        ("H100", None),
    ],
)
def test_only_the_exact_name_of_a_device_has_a_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(GPU) == peak == PEAK_FLOPS.get(name) and peak_flops(torch.device("cpu")) is None


def test_mfu_charges_attention_within_documents(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    model, lengths = small(), {None: 10.0, 16: 8.0}
    rate, mfu = Throughput(model, GPU, 2).read(2.0, 1000, lengths)
    attention = 6 * 4 * 8 * (3 * 8 + 10)  # 4 heads of 8; three layers in chunks of 16, one without
    assert rate == 500 and mfu == 500 * (training_flops(model, 64).matrices + attention) / 2 / 989.5e12
    assert mfu < Throughput(model, GPU, 2).read(2.0, 1000, 64)[1], "the control: one document a row"


def test_a_run_measures_the_lengths_of_its_documents(tmp_path, small_corpus):
    run = trainer(tmp_path, "run", [*small_corpus])
    batches = [run.batches.get(step) for step in range(3)]
    run.batches.read(run.world.device)
    for chunk, found in run.batches.lengths.items():
        lengths = [n for batch in batches for row in batch.positions_BT.tolist() for n in pieces(row, chunk)]
        assert found == sum(n * n for n in lengths) / sum(lengths)
    whole = run.batches.lengths[None]
    assert 1 < whole < run.phase(0).seq_len, "documents are packed"
    run.batches.close()


def pieces(row: list[int], chunk: int | None) -> list[int]:
    """Return the lengths of the documents of a sequence, or of their chunks, one position after the other."""
    found: list[int] = []
    for at, position in enumerate(row):
        if at == 0 or position == 0 or (chunk and position % chunk == 0):
            found.append(0)
        found[-1] += 1
    return found
