"""Read YAML that may come from a stranger. Nothing in it is executed, and its size is limited.

YAML has traps that a configuration never needs: duplicate keys, of which the last wins silently; aliases, with which
a few lines expand to billions of values; objects that contain themselves. They are rejected.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from core.errors import UnreadableFileError
from core.files import read_text

LIMIT = 16 * 2**20
DEPTH, VALUES = 64, 1_000_000
"""Deepest nesting, and the largest number of values after aliases are expanded."""


def read_yaml(path: Path) -> Any:
    """Return the content as dicts with text keys, lists, text, numbers, booleans and None.

    Raises `UnreadableFileError` with the path and the line of the problem, and `OSError` as `open` does.
    """
    text = read_text(path, LIMIT)
    try:
        value = _Loader(text).get_single_data()
        _check(value)
        return value
    except yaml.YAMLError as error:
        raise UnreadableFileError(f"{path}: {_line(error)}") from None
    except RecursionError:
        raise UnreadableFileError(f"{path}: is nested too deeply") from None
    except ValueError as error:  # an impossible date, a number of too many digits
        raise UnreadableFileError(f"{path}: {error}") from None


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"names the key {name!r} twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _check(value: Any) -> None:
    """Raise `ValueError` for values that JSON does not have, and for too many of them or too deep nesting."""
    count, todo = 0, [(value, 0)]
    while todo:
        part, depth = todo.pop()
        count += 1
        if depth > DEPTH:
            raise ValueError("is nested too deeply, or contains itself")
        if count > VALUES:
            raise ValueError(f"has more than {VALUES:,} values")
        if isinstance(part, dict):
            for key in part:
                if not isinstance(key, str):
                    raise ValueError(f"the key {key!r} must be text: write it in quotes")
            todo += [(one, depth + 1) for one in part.values()]
        elif isinstance(part, list):
            todo += [(one, depth + 1) for one in part]
        elif not isinstance(part, str | int | float | bool | None):
            raise ValueError(f"the value {part} is a {type(part).__name__}: write it in quotes")


def _line(error: yaml.YAMLError) -> str:
    problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    return problem if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
