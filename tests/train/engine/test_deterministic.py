"""`training.deterministic` sets what it must before a GPU is used, and without it nothing is touched."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from core.errors import ConfigError
from tests.support.tiny import config
from train import trainer
from train.engine.deterministic import make_deterministic

WANTED = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}


@pytest.fixture(autouse=True)
def unchanged(monkeypatch) -> Iterator[None]:
    """Restore what the function changes for the process."""
    memory = torch.utils.deterministic
    before = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    for name in WANTED:
        monkeypatch.delenv(name, raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark = before
    for name in WANTED:
        os.environ.pop(name, None)


def test_it_sets_what_it_must():
    torch.backends.cudnn.benchmark = True
    environment = {"HOME": "/home"}
    make_deterministic(environment)
    assert environment == {"HOME": "/home", **WANTED}
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cudnn.benchmark and not torch.utils.deterministic.fill_uninitialized_memory
    chosen = {**WANTED, "CUBLAS_WORKSPACE_CONFIG": ":16:8", "NCCL_ALGO": "Ring"}
    make_deterministic(kept := dict(chosen))
    assert kept == chosen, "it overwrote the user's"


@pytest.mark.parametrize(
    ("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLS"), (list(WANTED)[2], "1")]
)
def test_a_variable_that_breaks_the_promise_is_rejected(name, value):
    environment = {name: value}
    with pytest.raises(ConfigError, match=f"{name}={value} lets results differ: unset it"):
        make_deterministic(environment)
    assert environment == {name: value} and not torch.are_deterministic_algorithms_enabled()


def test_it_is_rejected_after_a_gpu_was_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="uses a GPU already: set CUBLAS_WORKSPACE_CONFIG=:4096:8, "):
        make_deterministic({})
    make_deterministic(dict(WANTED))  # what an earlier run of this process has set holds


class Reached(Exception):
    """Raised in place of the first use of a GPU."""


@pytest.mark.parametrize("key", [True, False])
def test_a_run_sets_it_before_it_uses_a_gpu(tmp_path, monkeypatch, key):
    def use() -> None:
        raise Reached(os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.are_deterministic_algorithms_enabled())

    monkeypatch.setattr(trainer, "device_of_rank", use)
    run = config(tmp_path, "run", "data.tokenizer.vocab_size=320", f"training.deterministic={str(key).lower()}")
    with pytest.raises(Reached) as found:
        trainer.run(run)
    assert found.value.args == ((":4096:8", True) if key else (None, False))


def test_without_the_key_nothing_is_touched(tmp_path, monkeypatch):
    def use() -> None:
        raise Reached

    monkeypatch.setattr(trainer, "device_of_rank", use)
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    torch.use_deterministic_algorithms(True)  # the caller's choice
    with pytest.raises(Reached):
        trainer.run(config(tmp_path, "run", "data.tokenizer.vocab_size=320"))
    assert torch.are_deterministic_algorithms_enabled() and os.environ["NCCL_ALGO"] == "NVLS"
    assert torch.utils.deterministic.fill_uninitialized_memory
