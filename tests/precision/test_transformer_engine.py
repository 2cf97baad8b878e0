"""Test the version of Transformer Engine and the reasons why it is unavailable, without a GPU."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch

from precision import transformer_engine as backend
from precision.config import Recipe
from tests.support.fakes.transformer_engine_stub import installed

TE = "transformer_engine"


def test_the_version_is_the_same_everywhere():
    version, root = backend.VERSION, Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["te"] == [f"transformer-engine[pytorch]=={version}"]
    assert f'"transformer-engine[pytorch]=={version}"' in backend.INSTALL
    constraints = (root / "docs/containers/constraints.txt").read_text().split()
    pins = dict(line.split("==") for line in constraints if "==" in line)
    assert {pins[f"transformer-engine{part}"] for part in ("", "-cu13", "-torch")} == {version}
    guide = (root / "docs/fp8_install.md").read_text()
    assert f"Engine](https://github.com/NVIDIA/TransformerEngine) {version}" in guide


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def package(monkeypatch):
    """Return `package(version, error)`, which fakes a distribution; importing it raises `error` if given."""

    def install(version: str | None, error: Exception | None = None) -> None:
        class Broken(ModuleType):
            @property
            def __path__(self):
                raise error

        def asked(name: str) -> str:
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        for name in [name for name in sys.modules if name.split(".")[0] == TE]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, TE, ModuleType(TE) if error is None else Broken(TE))
        if error is None:
            monkeypatch.setitem(sys.modules, f"{TE}.pytorch", ModuleType(f"{TE}.pytorch"))
        monkeypatch.setattr(importlib.metadata, "version", asked)

    return install


def test_not_installed_or_built_from_source(package):
    package(f"{backend.VERSION}+a1b2c3d")
    assert backend._installation_problems() == []
    assert backend.version() == f"Transformer Engine {backend.VERSION}+a1b2c3d"
    package(None)
    missing = f"Transformer Engine is not installed: {backend.INSTALL}"
    assert backend.unavailable(Recipe.blockwise, GPU) == [missing] and backend.VERSION in missing
    assert backend.version() == "Transformer Engine (not installed)"


def test_every_reason_is_reported_at_once(package):
    package("2.9.0", RuntimeError("Found empty meta package. \nInstall it with extensions"))
    gpu, other, broken = backend.unavailable(Recipe.blockwise, CPU)
    assert gpu == "Transformer Engine needs an NVIDIA GPU; the device is cpu"
    assert other == f"Transformer Engine 2.9.0 is installed, but {backend.VERSION} is needed: {backend.INSTALL}"
    error = "RuntimeError: Found empty meta package. Install it with extensions"
    assert broken == f"Transformer Engine 2.9.0 is installed but does not import ({error}): {backend.INSTALL}"


def test_the_device_is_tried_before_training(monkeypatch):
    monkeypatch.setattr(backend, "_installation_problems", lambda: [])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(backend, "_unsupported", lambda recipe: None)
    monkeypatch.setattr(backend, "_trial_failure", lambda recipe, device: None)
    assert backend.unavailable(Recipe.blockwise, GPU) == []
    monkeypatch.setattr(backend, "_trial_failure", lambda recipe, device: f"other bytes for {recipe.value} on {device}")
    assert backend.unavailable(Recipe.blockwise, GPU) == [f"other bytes for blockwise on {GPU}"]
    monkeypatch.setattr(backend, "_unsupported", lambda recipe: "its own reason")
    assert backend.unavailable(Recipe.blockwise, GPU) == ["its own reason"]


def test_its_own_reason_is_reported(monkeypatch):
    reason = "Device compute capability 10.0 or higher required for MXFP8 execution"
    with installed():
        monkeypatch.setattr(sys.modules[f"{TE}.pytorch.quantization"], "_MXFP8_SUPPORT", (False, f"{reason}."))
        found = {recipe: backend._unsupported(recipe) for recipe in backend.RECIPES}
    assert found.pop(Recipe.mxfp8) == f"{reason} (precision.recipe=auto selects a supported one)"
    assert set(found.values()) == {None}
