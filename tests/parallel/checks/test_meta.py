"""Meta tensors of integers have values, other tensors have none; memory is followed by kind; ranks are replayed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.checks.counting import Counter
from parallel.checks.deadlock import deadlocks_among
from parallel.checks.memory import Memory
from parallel.checks.meta import META, UnknownValueError, meta_device
from parallel.checks.recorder import Issued
from parallel.comm.collectives import all_gather_no_grad, all_to_all
from parallel.mesh import MeshAxis


def test_integers_are_computed_through_views_and_writes():
    with meta_device():
        x = torch.arange(12, device=META).view(3, 4)
        y = x.t().remainder(5)
        y[1].add_(10)
        y.flatten()[:2] = 7  # a copy: y is not contiguous
        order = y.flatten().sort(stable=True).indices
        made = torch.tensor([3, 4], device=META)
        assert (y.tolist(), made.sum().item()) == ([[0, 4, 3], [11, 10, 14], [2, 1, 0], [3, 2, 1]], 7)
    assert order.device == META


def test_values_that_do_not_follow_are_unknown():
    with meta_device():
        logits = torch.randn(4, 8, device=META)
        chosen = logits.argmax(-1)
        with pytest.raises(UnknownValueError, match=r"int64 \[4\]"):
            chosen.tolist()
        counts = torch.zeros(8, dtype=torch.int64, device=META)
        view = counts[:4]
        view.copy_(chosen)  # a view of known values is overwritten by unknown ones
        with pytest.raises(UnknownValueError):
            counts.tolist()
        with pytest.raises(UnknownValueError, match="float32"):
            logits.sum().item()


def test_collectives_bring_what_equal_ranks_send():
    dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    try:
        axis = MeshAxis("world", 3, 1, dist.group.WORLD)
        with meta_device():
            x = torch.tensor([[1, 2], [3, 4], [5, 6]], device=META)
            ones = [1] * 3
            assert all_to_all(x, ones, ones, axis, "counts").tolist() == [[3, 4]] * 3
            assert all_gather_no_grad(x[:1], axis, 0, "counts").tolist() == [[1, 2]] * 3
            axis.sum(x, "loss")
            assert x.tolist() == [[3, 6], [9, 12], [15, 18]]
            uneven = all_to_all(x, [0, 3, 0], [1, 1, 1], axis, "tokens")
            with pytest.raises(UnknownValueError):
                uneven.tolist()
            with pytest.raises(RuntimeError, match="input_split_sizes add up to 4 rows, but the input has 3"):
                all_to_all(x, [2, 1, 1], [1, 1, 1], axis, "tokens")
    finally:
        dist.destroy_process_group()


def test_memory_is_split_by_kind_at_its_peak():
    with Memory().following() as memory, Counter(memory=memory):
        kept = torch.empty(100, dtype=torch.uint8, device=META)
        memory.mark("first")
        for size in (50, 300):
            passing = torch.empty(size, dtype=torch.uint8, device=META)
            memory.mark("second")
        del passing
        kept.untyped_storage().resize_(0)
        kept.untyped_storage().resize_(80)
        memory.label([kept], "weights")
    assert memory.live == 80 and memory.peak == 450
    peak = memory.highest()
    assert (peak.bytes, peak.by_kind, peak.during) == (450, {"weights": 100, "activations": 350}, "second")
    assert memory.highest("weights").bytes == 100


def test_some_ranks_of_a_large_world_are_checked():
    def world(size: int) -> Issued:
        return Issued("allreduce sum", "0", tuple(range(4096)), shapes=((size,),), dtypes=("int64",))

    far = Issued("send", "pp", (7, 4000), peer=4000, work=1)
    near = [Issued("send", "p", (7, 90), peer=90, work=3)], [Issued("receive", "p", (7, 90), peer=7, work=3)]
    assert deadlocks_among({7: [far, world(1), *near[0]], 90: [world(1), *near[1]]}) == []
    [fault] = deadlocks_among({7: [world(1)], 90: [world(2)]})
    assert "of ranks 7, 90" in fault and "rank 90 issues" in fault
    [fault] = deadlocks_among({7: near[0], 90: []})
    assert fault.startswith("message 1: rank 7 issues send to rank 90")
