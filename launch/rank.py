"""Run one rank of a verb: `python -m launch.rank VERB FILE`. FILE holds the verb's configuration as JSON."""

from __future__ import annotations

import importlib
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Run the verb and return the exit code."""
    from core.config import build
    from core.exit_codes import has_agent
    from core.files import read_json
    from core.process import ending_with_parent
    from launch.cli import VERBS

    name, path = arguments
    verb = VERBS[name]
    module = importlib.import_module(f"launch.verbs.{verb.module or name}")
    config = build(getattr(module, verb.config), read_json(Path(path)))
    with ending_with_parent(has_agent()):
        return getattr(module, verb.function)(config)


if __name__ == "__main__":
    from core.process import end_process, run_process

    end_process(run_process(main))
