"""Whether `precision/transformer_engine.py` names and calls only what a tree of Transformer Engine's sources has.

Imports and calls are found by walking our file. Of a variable that holds one of TE's objects `HOLDS` says what it may
be; an attribute of a variable that is neither there nor in `OURS` is a complaint as well, so that nothing new escapes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TE = "transformer_engine"
STORAGES = [
    f"{TE}.pytorch.tensor.storage.float8_tensor_storage:Float8TensorStorage",
    f"{TE}.pytorch.tensor.storage.float8_blockwise_tensor_storage:Float8BlockwiseQTensorStorage",
    f"{TE}.pytorch.tensor.storage.mxfp8_tensor_storage:MXFP8TensorStorage",
]
QUANTIZERS = [
    f"{TE}.pytorch.tensor.float8_tensor:Float8CurrentScalingQuantizer",
    f"{TE}.pytorch.tensor.float8_blockwise_tensor:Float8BlockQuantizer",
    f"{TE}.pytorch.tensor.mxfp8_tensor:MXFP8Quantizer",
]
AVAILABLE = [f"{TE}.pytorch.quantization:is_{name}_available" for name in ("fp8", "mxfp8", "fp8_block_scaling")]
HOLDS = {
    "part": STORAGES,
    "quantizer": QUANTIZERS,
    "scaling": [f"{TE}.common.recipe:Float8BlockScaling", f"{TE}.common.recipe:Float8CurrentScaling"],
    "product": [f"{TE}.common.recipe:MMParams"],
    "forward": [f"{TE}.pytorch.quantization:RecipeState"],
    "backward": [f"{TE}.pytorch.quantization:RecipeState"],
    "ask": AVAILABLE,
}
# fmt: off
OURS = {
    "self", "torch", "object", "a", "b", "x", "w", "y", "grad", "grads", "groups", "operand", "recipe", "device",
    "Recipe", "Operand", "importlib", "error", "reason", "reasons", "wrong", "installed", "engine", "emulation",
    "result", "exact", "ours", "found", "wanted", "rows", "inverse", "scale", "data", "tensor", "dtype",
    "products", "generator",
}
# fmt: on


@dataclass(frozen=True)
class Sources:
    tree: Callable[[str], ast.Module]

    def find(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        """Where a module's name is defined, through its imports."""
        for node in self.tree(module).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return module, node
        for node in self.tree(module).body:
            if isinstance(node, ast.ImportFrom) and any(alias.name in (name, "*") for alias in node.names):
                origin = _absolute(self, module, node)
                found = self.find(origin, name) if origin.startswith(f"{TE}.") else None
                if found:
                    return found
        return None

    def place(self, path: str) -> tuple[str, ast.stmt] | None:
        """`path` is MODULE:NAME."""
        return self.find(*path.split(":"))

    def classes(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and its bases."""
        yield module, node
        for base in node.bases:
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef):
                yield from self.classes(found[0], found[1])

    def member(self, path: str, name: str) -> ast.AST | None:
        """A method, a field or what `__init__` sets of a class."""
        place = self.place(path)
        if place is None or not isinstance(place[1], ast.ClassDef):
            return None
        for _, cls in self.classes(place[0], place[1]):
            for part in ast.walk(cls):
                if isinstance(part, ast.FunctionDef) and part.name == name and not _is_abstract(part):
                    return part
                target = part.target if isinstance(part, ast.AnnAssign) else None
                targets = part.targets if isinstance(part, ast.Assign) else [target]
                for one in targets:
                    if isinstance(one, ast.Name) and one.id == name:
                        return part
                    if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.attr == name:
                        return part
        return None


def _is_abstract(method: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node) for node in method.body)


def _absolute(sources: Sources, module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + _is_package(module)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _is_package(module: str) -> bool:
    from tests.support import te_wheel

    return te_wheel.sources().joinpath(*module.split(".")).is_dir()


def complaints(ours: str, sources: Sources) -> list[str]:
    """`ours`: the text of our file."""
    tree = ast.parse(ours)
    names = dict(_imports(tree))
    found = [f"{module} has no {name}" for name, module in names.items() if not sources.find(module, name)]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        for where, signature, is_method in _called(call, names, sources):
            found += [f"line {call.lineno}: {where} {problem}" for problem in misfits(call, signature, is_method)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found += [f"line {node.lineno}: {problem}" for problem in _strangers(node, names, sources)]
    return [*found, *_keys(tree, sources)]


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == TE:
            yield from ((alias.asname or alias.name, node.module or "") for alias in node.names)


def _holder(node: ast.expr, names: dict[str, str]) -> tuple[str, list[str]] | None:
    """The variable at the beginning of an expression, and which of TE's objects it may be."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "parts":
        return "parts[]", STORAGES
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_shallow_copy":
        return "_shallow_copy()", STORAGES
    if not isinstance(node, ast.Name):
        return None
    if node.id in names:
        return node.id, [f"{names[node.id]}:{node.id}"]
    return (node.id, HOLDS[node.id]) if node.id in HOLDS else None


def _called(
    call: ast.Call, names: dict[str, str], sources: Sources
) -> Iterator[tuple[str, ast.FunctionDef | None, bool]]:
    """What a call of ours may reach: a description, a signature (None: that of a class without `__init__`), whether its
    first parameter is bound.
    """
    if isinstance(call.func, ast.Attribute):
        name = call.func.attr
        held = _holder(call.func.value, names)
        for path in held[1] if held else []:
            member = sources.member(path, name)
            if isinstance(member, ast.FunctionDef):
                yield f"{path}.{name}", member, not _is_static(member)
        return
    held = _holder(call.func, names)
    for path in held[1] if held else []:
        place = sources.place(path)
        if place and isinstance(place[1], ast.FunctionDef):
            yield path, place[1], False
        elif place:
            is_object = isinstance(call.func, ast.Name) and call.func.id in HOLDS
            member = sources.member(path, "__call__" if is_object else "__init__")
            yield path, member if isinstance(member, ast.FunctionDef) else None, True


def _is_static(node: ast.FunctionDef) -> bool:
    return any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)


def misfits(call: ast.Call, signature: ast.FunctionDef | None, is_method: bool) -> Iterator[str]:
    """What in a call does not fit a signature."""
    given = {keyword.arg for keyword in call.keywords}
    if signature is None:
        if call.args or call.keywords:
            yield "takes fields that are not looked up here"
        return
    arguments = signature.args
    positional = [one.arg for one in (*arguments.posonlyargs, *arguments.args)][int(is_method) :]
    if len(call.args) > len(positional) and not arguments.vararg:
        yield f"takes {len(positional)} arguments in order, not {len(call.args)}"
    if not arguments.kwarg:
        known = {*positional, *(one.arg for one in arguments.kwonlyargs)}
        yield from (f"has no parameter {name}" for name in sorted(filter(None, given - known)))
    needed = positional[len(call.args) : len(positional) - len(arguments.defaults)]
    needed += [k.arg for k, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
    yield from (f"needs {name}" for name in needed if name not in given)


def _strangers(node: ast.Attribute, names: dict[str, str], sources: Sources) -> Iterator[str]:
    """An attribute that TE's object lacks, or of a variable about which nothing is known."""
    held = _holder(node.value, names)
    if held:
        yield from (
            f"{path} has no {node.attr}" for path in held[1] if ":" in path and not _has(path, node.attr, sources)
        )
    elif isinstance(node.value, ast.Name) and node.value.id not in {*OURS, "tex"}:
        yield f"whose attribute is {node.value.id}.{node.attr}? Say so in tests/support/gemm_contract.py"


def _has(path: str, name: str, sources: Sources) -> bool:
    return sources.member(path, name) is not None


def _keys(tree: ast.Module, sources: Sources) -> Iterator[str]:
    """Names in `kept[...]` that no storage's `get_metadata` has."""
    known = set()
    for path in STORAGES:
        if method := sources.member(path, "get_metadata"):
            known |= {node.value for node in ast.walk(method) if isinstance(node, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "kept":
            for key in _texts(node.slice):
                if key not in known:
                    yield f"line {node.lineno}: no storage keeps {key}"


def _texts(node: ast.expr) -> list[str]:
    """What a key may be."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    assert isinstance(node, ast.JoinedStr), "keys are constants here, or begin with a side"
    tail = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
    return [side + tail for side in ("rowwise", "columnwise")]
