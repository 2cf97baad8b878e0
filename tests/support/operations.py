"""Observe the operations that torch dispatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Observed(TorchDispatchMode):
    """Calls `see(function, arguments, options)` for each operation that torch dispatches inside the context."""

    def __init__(self, see: Callable[..., Any]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.see(function, arguments, options or {})
        return function(*arguments, **(options or {}))
