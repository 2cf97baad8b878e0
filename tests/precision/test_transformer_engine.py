"""`precision/transformer_engine.py` against the sources of Transformer Engine, and what is said where it cannot be had.

No GPU: that TE's kernels give the reference's numbers is what `unavailable` tries on the device itself, and
test_gpu_float8.py.
"""

from __future__ import annotations

import ast
import copy
import importlib.metadata
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch

from core.errors import ConfigError
from precision import transformer_engine as backend
from precision.config import Backend, Compute, PrecisionConfig, Recipe
from precision.resolve import resolve
from tests.support import te_wheel
from tests.support.gemm_contract import STORAGES, TE, Sources, complaints
from tests.support.transformer_engine_stub import installed

OURS = Path(backend.__file__).read_text()
REAL = Sources(te_wheel.tree)


def test_every_name_call_and_attribute_is_there():
    assert complaints(OURS, REAL) == []


RENAMED = {
    "parameter": ("pytorch.cpp_extensions.gemm", "use_split_accumulator"),
    "keyword of a method": ("pytorch.tensor.storage.mxfp8_tensor_storage", "columnwise_usage"),
    "method": ("pytorch.tensor.storage.float8_tensor_storage", "restore_from_saved"),
    "class": ("common.recipe", "Float8BlockScaling"),
    "field of a recipe": ("common.recipe", "fp8_gemm_wgrad"),
    "flag": ("common.recipe", "use_split_accumulator"),
    "factory's parameter": ("pytorch.quantization", "num_quantizers"),
    "usage": ("pytorch.quantized_tensor", "set_usage"),
    "constant": ("pytorch.module.base", "_2X_ACC_DGRAD"),
    "question": ("pytorch.quantization", "return_reason"),
}


class Rename(ast.NodeTransformer):
    def __init__(self, old: str) -> None:
        self.old = old

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for place in ("name", "id", "arg", "attr"):
            if getattr(node, place, None) == self.old:
                setattr(node, place, "renamed")
        return super().generic_visit(node)


@pytest.mark.parametrize("module, name", RENAMED.values(), ids=RENAMED.keys())
def test_what_is_renamed_there_is_noticed(module, name):
    changed = Rename(name).visit(copy.deepcopy(te_wheel.tree(f"{TE}.{module}")))
    found = complaints(OURS, Sources(lambda m: changed if m == f"{TE}.{module}" else te_wheel.tree(m)))
    assert any(name in complaint for complaint in found), found


WRONG = {
    "keyword": ("m_splits=groups.host", "splits=groups.host"),
    "import": ("import general_gemm, general_grouped_gemm", "import general_gemm, grouped_gemm"),
    "attribute": ("quantizer.set_usage(", "quantizer.set_usages("),
    "missing argument": ("list(b.parts),\n", ""),
    "key": ("fp8_scale_inv", "scale_inv"),
    "unknown variable": ("quantizer.internal = True", "thing.internal = True"),
}


@pytest.mark.parametrize("old, new", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_here_is_noticed(old, new):
    assert old in OURS and complaints(OURS.replace(old, new), REAL)


def calls(module: str, name: str) -> list[ast.Call]:
    """TE's own calls of a function in one of its modules."""
    found = (node for node in ast.walk(te_wheel.tree(module)) if isinstance(node, ast.Call))
    return [node for node in found if ast.unparse(node.func).split(".")[-1] == name]


def test_the_extension_is_called_as_its_own_python_calls_it():
    """`split_quantize` is compiled: its signature is not in the wheel, TE's own call is."""
    (theirs,) = calls(f"{TE}.pytorch.module._split_quantization", "split_quantize")
    (ours,) = (node for node in ast.walk(ast.parse(OURS)) if isinstance(node, ast.Call) and _is_split(node))
    assert len(ours.args) == len(theirs.args) == 3 and not ours.keywords
    assert [ast.unparse(argument) for argument in theirs.args] == ["tensor", "split_sizes", "quantizers"]


def _is_split(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Attribute) and node.func.attr == "split_quantize"


@pytest.mark.parametrize("module, name", [("linear", "general_gemm"), ("grouped_linear", "general_grouped_gemm")])
def test_its_own_modules_ask_for_these_layouts(module, name):
    layouts = {
        keyword.value.value
        for node in ast.walk(te_wheel.tree(f"{TE}.pytorch.module.{module}"))
        if isinstance(node, ast.Call | ast.Dict)
        for keyword in _layouts(node)
    }
    place = REAL.place(f"{TE}.pytorch.cpp_extensions.gemm:{name}")
    assert place is not None
    gemm = place[1]
    assert isinstance(gemm, ast.FunctionDef)
    names = [argument.arg for argument in gemm.args.args]
    default = gemm.args.defaults[names.index("layout") - len(names)]
    assert layouts >= {"NN", "NT"} and ast.literal_eval(default) == "TN"


def _layouts(node: ast.Call | ast.Dict) -> list[ast.keyword]:
    if isinstance(node, ast.Call):
        return [k for k in node.keywords if k.arg == "layout" and isinstance(k.value, ast.Constant)]
    pairs = [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
    return [ast.keyword(name, v) for name, v in pairs if name == "layout" and isinstance(v, ast.Constant)]


def test_quantizers_come_in_this_order():
    for name, begin in (
        ("_FWD_DEFAULT_TENSOR_TYPES", ("input", "weight")),
        ("_BWD_DEFAULT_TENSOR_TYPES", ("grad_output",)),
    ):
        node = REAL.member(f"{TE}.pytorch.quantization:RecipeState", name)
        assert isinstance(node, ast.Assign) and ast.literal_eval(node.value)[: len(begin)] == begin


def test_a_storage_can_be_copied_by_its_attributes():
    assert all(REAL.member(path, "__slots__") is None for path in STORAGES)


def test_the_version_is_the_same_everywhere():
    version, root = backend.VERSION, te_wheel.ROOT
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["te"] == [f"transformer-engine[pytorch]=={version}"]
    assert f'"transformer-engine[pytorch]=={version}"' in backend.INSTALL
    pins = dict(
        line.split("==") for line in (root / "docs/containers/constraints.txt").read_text().split() if "==" in line
    )
    assert {pins[f"transformer-engine{part}"] for part in ("", "-cu13", "-torch")} == {version}
    assert (
        f"Engine](https://github.com/NVIDIA/TransformerEngine) {version}" in (root / "docs/fp8_install.md").read_text()
    )


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def package(monkeypatch):
    """`package(version, module)`: such a distribution is installed; importing it gives the module or raises."""

    def install(version: str | None, outcome: Exception | None = None) -> None:
        real = importlib.metadata.version

        def asked(name: str) -> str:
            if name != "transformer-engine":
                return real(name)
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == "transformer_engine" and outcome is not None:
                    raise outcome
                return None

        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            monkeypatch.delitem(sys.modules, name)
        if outcome is None and version is not None:
            for name in ("transformer_engine", "transformer_engine.pytorch"):
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(importlib.metadata, "version", asked)
        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])

    return install


def test_not_installed(package):
    package(None)
    gpu, missing = backend.unavailable(Recipe.blockwise, CPU)
    assert gpu == "Transformer Engine needs an NVIDIA GPU, and this is the cpu"
    assert missing == f"Transformer Engine is not installed: {backend.INSTALL}" and backend.VERSION in missing
    assert backend.unavailable(Recipe.blockwise, GPU) == [missing]
    assert backend.version() == "Transformer Engine (not installed)"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Found empty `transformer-engine` meta package installed. \nInstall it with framework extensions"),
        OSError("libcudnn.so.9: cannot open shared object file"),
        AssertionError("Could not find `transformer-engine` PyPI package."),
        FileNotFoundError("Could not find shared object file: transformer_engine_torch"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_installed_without_its_libraries(package, error):
    package(backend.VERSION, error)
    (reason,) = backend.unavailable(Recipe.mxfp8, GPU)
    told = " ".join(str(error).split())
    assert reason == (
        f"Transformer Engine {backend.VERSION} is installed and does not import ({type(error).__name__}: {told}): "
        f"{backend.INSTALL}"
    )


def test_every_reason_is_told_at_once(package):
    package("2.9.0", OSError("no library"))
    gpu, other, broken = backend.unavailable(Recipe.blockwise, CPU)
    assert "GPU" in gpu and "no library" in broken
    assert (
        other == f"Transformer Engine 2.9.0 is installed, and only {backend.VERSION} is known to fit: {backend.INSTALL}"
    )


def test_a_build_of_the_version_from_source_is_taken(package):
    package(f"{backend.VERSION}+a1b2c3d")
    assert backend._installation() == []
    assert backend.version() == f"Transformer Engine {backend.VERSION}+a1b2c3d"


def test_the_user_sees_one_line(package):
    package(None)
    config = PrecisionConfig(compute=Compute.bfloat16, backend=Backend.te)
    with pytest.raises(ConfigError, match=r"precision\.backend=te: cannot do blockwise here: .*; .*pip install"):
        resolve(config, CPU)


def test_nothing_unproven_trains(monkeypatch):
    """Where all is installed, TE is asked, and then tried."""
    monkeypatch.setattr(backend, "_installation", lambda: [])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(backend, "_refusal", lambda recipe: None)
    monkeypatch.setattr(backend, "_tried", lambda recipe, device: None)
    assert backend.unavailable(Recipe.blockwise, GPU) == []
    monkeypatch.setattr(backend, "_tried", lambda recipe, device: f"gives other bytes for {recipe.value} on {device}")
    assert backend.unavailable(Recipe.blockwise, GPU) == [f"gives other bytes for blockwise on {GPU}"]
    monkeypatch.setattr(backend, "_refusal", lambda recipe: "its own reason")
    assert backend.unavailable(Recipe.blockwise, GPU) == ["its own reason"]


def test_its_own_reason_against_a_device_is_told():
    with installed():
        quantization = sys.modules[f"{TE}.pytorch.quantization"]
        quantization._MXFP8_SUPPORT = False, "Device compute capability 10.0 or higher required for MXFP8 execution."
        try:
            assert backend._refusal(Recipe.blockwise) is backend._refusal(Recipe.tensorwise) is None
            reason = backend._refusal(Recipe.mxfp8)
        finally:
            quantization._MXFP8_SUPPORT = True, ""
    assert reason == (
        "Device compute capability 10.0 or higher required for MXFP8 execution "
        "(precision.recipe=auto takes what the GPU has)"
    )
