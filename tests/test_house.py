"""Rules of the repository: imports go down and form no circle; files, functions and folders are small; class names are
unique; nothing is unpickled.

Each rule is a function from a source tree to complaints, so that it can be tested on a bad tree.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "core": {"configs"},  # the folder of YAML files, looked up by its package
    "precision": {"core"},
    "model": {"core", "precision"},
    "data": {"core"},
    "hparam": {"core", "precision", "model"},
    "parallel": {"core", "precision", "model"},
    "train": {"core", "precision", "model", "parallel", "hparam", "data"},
    "launch": {"core", "precision", "model", "parallel", "hparam", "data", "train"},
    "configs": set(),
}
FILE_LINES, FUNCTION_LINES, FOLDER_FILES, NAME_CHARACTERS = 600, 80, 15, 60
PACKAGES = [*MAY_IMPORT, "bench"]
PUBLISHED = [*PACKAGES, "tests"]
SENDS_OBJECTS = {"launch/rank_pool.py"}
"""Files that may import pickle: what they read comes from processes that they started."""


def sources(root: Path, folders: list[str]) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root), parsed(path.read_text())


parsed = cache(ast.parse)


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the top-level names imported in a file, inside functions too, and their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], node.lineno


def upward_imports(root: Path) -> list[str]:
    return [
        f"{path}:{line} {path.parts[0]} must not import {name}"
        for path, tree in sources(root, list(MAY_IMPORT))
        for name, line in imported(tree)
        if name in PUBLISHED and name != path.parts[0] and name not in MAY_IMPORT[path.parts[0]]
    ]


def too_long(root: Path) -> list[str]:
    found = []
    for path, tree in sources(root, PUBLISHED):
        lines = len((root / path).read_text().splitlines())
        if lines > FILE_LINES:
            found.append(f"{path} has {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > FUNCTION_LINES:
                    found.append(f"{path}:{node.lineno} {node.name} has {size} lines")
    return found


def crowded_folders(root: Path) -> list[str]:
    folders = Counter(path.parent for path, _ in sources(root, PUBLISHED))
    return [f"{folder} holds {count} modules" for folder, count in folders.items() if count > FOLDER_FILES]


def import_graph(root: Path) -> dict[str, set[str]]:
    """Return which of our modules each module imports, inside functions and for type checkers too."""
    trees = {module_name(path): tree for path, tree in sources(root, PACKAGES)}
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {one if one in trees else node.module for one in whole}
        graph[name] = (found & trees.keys()) - {name}
    return graph


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def import_circles(root: Path) -> list[str]:
    """Return one complaint for each edge that closes a circle in a depth-first walk."""
    graph, done, found = import_graph(root), set(), []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            found.append(" -> ".join([*above[above.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    return found


def names_defined_twice(root: Path) -> list[str]:
    """Return the class names, private ones too, that the packages and benchmarks define more than once."""
    places: dict[str, list[str]] = {}
    for path, tree in sources(root, PACKAGES):
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path))
    return [f"{name}: {', '.join(paths)}" for name, paths in places.items() if len(paths) > 1]


def unpickling(root: Path) -> list[str]:
    """Return imports and calls that can execute code from a file. `SENDS_OBJECTS` may pickle: ranks of a run use it."""
    unsafe = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = []
    for path, tree in sources(root, list(MAY_IMPORT)):
        if path.as_posix() in SENDS_OBJECTS:
            continue
        found += [f"{path}:{line} imports {name}" for name, line in imported(tree) if name in unsafe]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called, words = ast.unparse(node.func), {word.arg for word in node.keywords}
                if called in ("torch.load", "yaml.load", "yaml.unsafe_load") or "allow_pickle" in words:
                    found.append(f"{path}:{node.lineno} calls {called}")
    return found


def swallowed(root: Path) -> list[str]:
    """Return each `except ...: pass`, bare `except:` and star import."""
    found = []
    for path, tree in sources(root, PUBLISHED):
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                empty = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
                if node.type is None or empty:
                    found.append(f"{path}:{node.lineno} swallows an exception")
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                found.append(f"{path}:{node.lineno} star import")
    return found


def undocumented(root: Path) -> list[str]:
    """Return the modules of the packages without a docstring."""
    return [str(path) for path, tree in sources(root, list(MAY_IMPORT)) if not ast.get_docstring(tree)]


def heavy_imports(root: Path) -> list[str]:
    """Return top-level imports of libraries that are slow to import and that some verbs do not need."""
    heavy = {"datasets", "wandb", "tiktoken", "tokenizers", "pyarrow", "transformers", "matplotlib"}
    return [
        f"{path}:{node.lineno} imports {name} at the top"
        for path, tree in sources(root, list(MAY_IMPORT))
        for node in tree.body
        for name, _ in imported(ast.Module([node], []))
        if isinstance(node, ast.Import | ast.ImportFrom) and name in heavy
    ]


def transformer_engine_outside(root: Path) -> list[str]:
    return [
        f"{path}:{line}"
        for path, tree in sources(root, PUBLISHED)
        for name, line in imported(tree)
        if name == "transformer_engine" and path.as_posix() != "precision/transformer_engine.py"
    ]


def long_test_names(root: Path) -> list[str]:
    return [
        f"{path}:{node.lineno} {node.name}"
        for path, tree in sources(root, ["tests"])
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > NAME_CHARACTERS
    ]


RULES = [
    upward_imports,
    too_long,
    crowded_folders,
    import_circles,
    names_defined_twice,
    unpickling,
    swallowed,
    undocumented,
    heavy_imports,
    transformer_engine_outside,
    long_test_names,
]
BAD = {
    "upward_imports": {"data/x.py": '"""X."""\ndef f():\n    from train import trainer\n'},
    "too_long": {"model/x.py": '"""X."""\ndef f():\n' + "    a = 1\n" * 90},
    "crowded_folders": {f"core/x{n}.py": '"""X."""\n' for n in range(16)},
    "import_circles": {
        "data/x.py": '"""X."""\nfrom data import y\n',
        "data/y.py": '"""Y."""\ndef f():\n    from data.z import g\n',
        "data/z.py": '"""Z."""\nimport data.x\n',
    },
    "names_defined_twice": {f"{name}/x.py": '"""X."""\nclass X:\n    pass\n' for name in ("core", "bench")},
    "unpickling": {"train/x.py": '"""X."""\nimport torch\ntorch.load("x")\n'},
    "swallowed": {"core/x.py": '"""X."""\ntry:\n    a = 1\nexcept ValueError:\n    pass\n'},
    "undocumented": {"train/x.py": "a = 1\n"},
    "heavy_imports": {"data/x.py": '"""X."""\nimport datasets\n'},
    "long_test_names": {"tests/x.py": f"def test_{'x' * 60}():\n    assert True\n"},
    "transformer_engine_outside": {"model/x.py": '"""X."""\nimport transformer_engine\n'},
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_its_rules(rule):
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_rule_notices_a_breach(rule, tmp_path):
    for name, text in BAD[rule.__name__].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert len(rule(tmp_path)) == 1


def test_the_wheel_holds_every_package_and_the_yaml_files():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == set(MAY_IMPORT)
    assert not any(re.search("torchvision|torchaudio", line) for line in project["project"]["dependencies"])
