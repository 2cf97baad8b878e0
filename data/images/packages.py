"""Say how to install an optional package that is missing."""

from __future__ import annotations

from importlib import import_module

from core.errors import ConfigError

_NEEDED = {"PIL": ("pictures", "Pillow", "vision"), "av": ("videos", "PyAV", "video")}
"""For each module: what needs it, its package, and our extra that installs it."""


def require(module: str) -> None:
    """Raise `ConfigError` with the line that installs the package, unless `module` can be imported."""
    try:
        import_module(module)
    except ImportError:
        what, package, extra = _NEEDED[module]
        raise ConfigError("", None, f"{what} need {package}: pip install 'leviathan[{extra}]'") from None
