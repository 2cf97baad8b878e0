"""Write the text of `leviathan VERB --help`: every key with its value, type and documentation."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import yaml

WIDTH = 100


def describe(schema: type, values: dict[str, Any], configs: Path, read_later: dict[str, type]) -> str:
    """Return the help text.

    `values`: the composed configuration as plain data. `configs`: the folder of Hydra's groups. `read_later`: the
    dataclasses of keys that the schema declares only as dicts.
    """
    return "\n".join([*_groups(schema, configs), *_component(schema, values, "", read_later)]).lstrip("\n")


def _groups(schema: type, configs: Path) -> Iterator[str]:
    """Yield the choices `GROUP=NAME` of the configuration groups that this verb uses."""
    parts = {field.name for field in dataclasses.fields(schema)}
    for folder in sorted(path for path in configs.iterdir() if path.is_dir()):
        names = sorted(path.stem for path in folder.glob("*.yaml"))
        if names and (folder.name in parts or ("model" in parts and folder.name == "experiment")):
            yield f"{folder.name}={' | '.join(names)}"


def _component(
    cls: type, values: dict[str, Any], prefix: str, read_later: dict[str, type], around: tuple[type, ...] = ()
) -> Iterator[str]:
    """Yield a component's documentation, its keys, and then its inner components, except those in `around`, which
    contain it.
    """
    yield ""
    for part in _parts(cls):
        if part.__doc__ and not part.__doc__.startswith(f"{part.__name__}("):  # no docstring from dataclass
            yield from _comment(part.__doc__, "")
    hints, documentation, inner = typing.get_type_hints(cls), field_documentation(cls), []
    for field in dataclasses.fields(cls):
        kind = read_later.get(f"{prefix}{field.name}", hints[field.name])
        value = values[field.name] if field.name in values else _default(field)
        if dataclasses.is_dataclass(kind):
            inner.append((kind, value, f"{prefix}{field.name}."))
            continue
        yield f"{prefix}{field.name}={_text(value)}  ({_type_name(kind)})"
        yield from _words(documentation.get(field.name, ""), kind)
        for part, name in _entries(kind):
            if part in (cls, *around):
                continue
            inner.append((part, {}, f"{prefix}{field.name}.{name}".removesuffix(".") + "."))
    for kind, value, path in inner:
        yield from _component(typing.cast(type, kind), value, path, read_later, (cls, *around))


def _words(documentation: str, kind: Any) -> Iterator[str]:
    """Yield the documentation of a key. If it takes a name: that of the enum first, and of each name last."""
    enums = _enums(kind)
    yield from _comment(" ".join([*(ast.get_docstring(_source(enum)) or "" for enum in enums), documentation]), "    ")
    for enum in enums:
        for name, text in _literals(enum).items():
            yield from _comment(f"{name}: {text}", "    ")


def _enums(kind: Any) -> list[type[Enum]]:
    """Return the enums of a type: of itself, of a union's parts or of a list's entries."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [kind]
    return [enum for part in typing.get_args(kind) for enum in _enums(part)]


def field_documentation(cls: type) -> dict[str, str]:
    """Return the string literal after each field in the source of its class and of the dataclasses it inherits from."""
    return {name: text for part in _parts(cls) for name, text in _literals(part).items()}


def _literals(cls: type) -> dict[str, str]:
    """Return the string literal after each field of a dataclass, or after each member of an enum."""
    found, last = dict[str, str](), None
    for node in _source(cls).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and last is not None:
            found[last] = str(node.value.value)
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        last = targets[0].id if targets and isinstance(targets[0], ast.Name) else None
    return found


def _source(cls: type) -> ast.ClassDef:
    return _classes(inspect.getfile(cls))[cls.__name__]


@cache
def _classes(file: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _parts(cls: type) -> list[type]:
    """Return the dataclasses that a component inherits from, followed by the component itself."""
    return [part for part in reversed(cls.__mro__) if dataclasses.is_dataclass(part)]


def _entries(kind: Any) -> Iterator[tuple[type, str]]:
    """Yield the components inside an optional, list or dict, with the placeholder INDEX or NAME for their key."""
    names = {list: "INDEX", dict: "NAME"}
    for argument in typing.get_args(kind):
        if dataclasses.is_dataclass(argument):
            yield typing.cast(type, argument), names.get(typing.get_origin(kind), "")


def _default(field: dataclasses.Field[Any]) -> Any:
    from core.config import plain

    made = field.default_factory is not dataclasses.MISSING
    value = typing.cast(Any, field.default_factory)() if made else field.default
    return "???" if value is dataclasses.MISSING else plain(value)


def _text(value: Any) -> str:
    """Write a value as it would be typed after `=`."""
    if isinstance(value, str) and value:
        return value
    return (
        yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
        .removesuffix("...\n")
        .strip()
    )


def _comment(text: str, indent: str) -> list[str]:
    wrapped = textwrap.wrap(" ".join(text.split()), WIDTH - len(indent))
    return [f"{indent}# {line}" for line in wrapped]


def _type_name(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join("null" if part is type(None) else _type_name(part) for part in arguments)
    if arguments:
        return f"{kind.__name__}[{', '.join(map(_type_name, arguments))}]"
    if kind is Any:
        return "anything"
    return " | ".join(kind.__members__) if issubclass(kind, Enum) else kind.__name__
