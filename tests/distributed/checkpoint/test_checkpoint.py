"""Checkpoints of many ranks: inside or outside the run's directory, each byte once, at most one file per rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import ConfigError
from tests.support.tiny import EXACT, saved, trainer
from train.run_directory import committed

ADAMW = ["optimizer=adamw"]


def sizes(root: Path, overrides: list[str]) -> tuple[int, int]:
    """Save step 2. Return the number of bytes of this rank's tensors, and the step from which a second run resumes."""
    run = saved(root, "run", overrides, 2)
    again = trainer(root, "run", overrides)
    return sum(part.tensor.nbytes for part in run.engine.state() if part.shape), again.step


@pytest.fixture(scope="module")
def bytes_alone(ranks, small_corpus, tmp_path_factory) -> int:
    root = tmp_path_factory.mktemp("alone")
    return int(ranks(1, sizes, root, [*small_corpus, *EXACT, *ADAMW])[0][0])


@pytest.mark.parametrize("where", [None, "file://{}/store", "{}/local"], ids=["own", "url", "path"])
def test_replicas_are_written_once(ranks, small_corpus, tmp_path, bytes_alone, where):
    overrides = [*small_corpus, *EXACT, *ADAMW, "parallel.dp_replicate=2", "parallel.ep=2"]
    checkpoints = tmp_path / "run" / "checkpoints"
    if where is not None:
        overrides.append(f"checkpoint.directory={where.format(tmp_path)}")
        checkpoints = Path(overrides[-1].partition("=")[2].removeprefix("file://")) / "run"
    results = ranks(4, sizes, tmp_path, overrides)
    assert [step for _, step in results] == [2] * 4
    ((_, path),) = committed(checkpoints)
    files = list(path.glob("*.bin"))
    written = sum(file.stat().st_size for file in files)
    counters = 4 * 2 * 4 * 100  # step counts, which are scalars
    assert bytes_alone <= written < bytes_alone + counters, "every byte is written once"
    assert sum(kept for kept, _ in results) > 1.9 * bytes_alone, "control: the two replicas keep every byte twice"
    assert 1 <= len(files) <= 4


def test_other_and_unwritable_checkpoint_places_are_rejected(small_corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"checkpoint\.directory=.*cannot be written"):
        trainer(tmp_path, "new", [*small_corpus, f"checkpoint.directory={tmp_path / 'file'}"])
    saved(tmp_path, "run", [*small_corpus, *EXACT])
    with pytest.raises(ConfigError, match=r"checkpoint\.directory.* was started with None"):
        trainer(tmp_path, "run", [*small_corpus, *EXACT, f"checkpoint.directory={tmp_path / 'other'}"])
