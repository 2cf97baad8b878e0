"""Memory of published jobs, DeepSeek-V3's lines first. A planner that forgets a component is noticed."""

from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import ConfigError
from launch.plan import validate
from launch.plan.calibration import default_calibration
from launch.plan.cluster import find_gpu
from launch.plan.memory import GIB, passes_in_flight, stage_memories, state_bytes
from launch.plan.stages import parameters, split_layers
from launch.plan.workload import Axes, ExpertShapes, Job, LatentShapes, Shapes, Software

HERE = Path(__file__).parent
DEEPSEEK = Shapes(
    hidden=7168,
    layers=61,
    ffn=18432,
    heads=128,
    kv_heads=128,
    vocab=129280,
    head_dim=128,
    latent=LatentShapes(1536, 512, 64, 128, 128),
    experts=ExpertShapes(256, 8, 2048, shared_hidden=2048, first_dense=3),
    mtp=1,
)
LAYOUT = Axes(pp=4, vpp=4, ep=64, dp=64)


def deepseek() -> Job:
    return Job(DEEPSEEK, LAYOUT, find_gpu("H100"), seq=4096, mbs=1, gbs=8192)


def static_lines(job: Job) -> tuple[float, float]:
    """Return GiB of weights and gradients, and of the optimizer, on a middle stage. The paper's estimator, that of
    Megatron, counts no routers.
    """
    stage = split_layers(job)[1]
    assert len(stage.layers) == 16
    local = parameters(job, stage)
    local = replace(local, dense=local.dense - 16 * 256 * 7168)
    weights, gradients, optimizer = state_bytes(job, local)
    return (weights + gradients) / GIB, optimizer / GIB


def test_deepseek_v3_has_its_published_static_memory():
    kept, optimizer = static_lines(deepseek())
    assert (round(kept, 1), round(optimizer, 1)) == (36.4, 32.1)  # 2603.07685, table 3
    assert DEEPSEEK.total_parameters() == pytest.approx(671.03e9, rel=1e-4)


def test_a_shard_too_many_is_seen_in_the_published_lines():
    kept, optimizer = static_lines(replace(deepseek(), axes=replace(LAYOUT, dp=128)))
    assert round(kept, 1) == 36.4
    assert round(optimizer, 1) != 32.1


def test_interleaving_keeps_more_passes_in_flight():
    job = deepseek()
    assert [sum(passes_in_flight(job, at)) / 4 for at in range(4)] == [4.75, 4.25, 3.75, 3.25]
    plain = replace(job, axes=replace(LAYOUT, vpp=1))
    assert [passes_in_flight(plain, at) for at in range(4)] == [[4], [3], [2], [1]]


@pytest.mark.parametrize(("table", "mean", "under"), [("rival", 0.025, 0.05), ("sweep", 0.01, 0.05)])
def test_memory_of_sampled_rows_is_near(table, mean, under):
    scores = validate.validate(HERE / f"{table}.csv", default_calibration())["memory"]
    assert scores["mean_error"] < mean
    assert scores["worst_under"] < under


@pytest.mark.parametrize("component", ["weights", "gradients", "optimizer", "activations", "logits", "buffers"])
def test_a_forgotten_component_is_seen(component, monkeypatch):
    calibration = default_calibration()

    def forgetful(job, calibration):
        return [replace(stage, **{component: 0.0}) for stage in stage_memories(job, calibration)]

    right = validate.validate(HERE / "rival.csv", calibration)["memory"]
    monkeypatch.setattr(validate, "stage_memories", forgetful)
    wrong = validate.validate(HERE / "rival.csv", calibration)["memory"]
    assert wrong["worst_under"] > 2 * right["worst_under"]
    assert wrong["mean_error"] > 1.2 * right["mean_error"]


def test_recomputation_keeps_less():
    job = deepseek()
    peaks = [
        max(stage.peak for stage in stage_memories(replace(job, recompute=frozenset(kinds)), default_calibration()))
        for kinds in ([], ["layernorm"], ["layernorm", "moe_act"], ["full"])
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4


def test_nanotron_splits_blocks_by_cost():
    shapes = Shapes(hidden=2048, layers=16, ffn=8192, heads=32, kv_heads=32, vocab=131072, head_dim=64, tied=True)
    job = Job(shapes, Axes(pp=4, dp=2), find_gpu("H100"), 4096, 1, 256, software=Software.nanotron)
    assert [len(stage.layers) for stage in split_layers(job)] == [5, 5, 5, 1]


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"pp": 128}, "pp"), ({"cp": 8192, "ep": 1}, "cp"), ({"ep": 3}, "ep"), ({"tp": 0}, "tp")],
)
def test_impossible_jobs_are_rejected(changes, key):
    with pytest.raises(ConfigError) as error:
        Job(DEEPSEEK, replace(LAYOUT, **changes), find_gpu("H100"), seq=4096, mbs=1, gbs=8192)
    assert error.value.key == key


def test_names_of_gpus():
    assert find_gpu("NVIDIA H100 SXM5").name == find_gpu("h100").name == "H100"
    assert find_gpu("A100").name == find_gpu("A100-80GB").name == "A100-80G"
    assert find_gpu("H100", "500 W part").name == "H100-96G"
    with pytest.raises(ConfigError, match="gpu"):
        find_gpu("TPU v5p")
