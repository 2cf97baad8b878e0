"""Measure what scorers without labels are worth: `python -m bench.data.difficulty [--set P] [--small-models]`.

The data are three generated kinds of problems with labels: problems of counted steps, mathematics at five levels, and
programming tasks in three grades; or a set of JSON lines (`prompt`, `response`, `label`, and `domain` if there are
several). The measure is the area under the ROC curve (AUC) inside domains and buckets of the length of the answer, or
of the prompt, with the 95% bootstrap interval of its mean over the seeds.

The candidates were developed on seed 0 of two kinds, and there on half of the domains; `HELD_OUT` has the rest. Results
are for seeds 1 to 3 and for domains that were held out. The picture is written to `--picture`, by default in docs/.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.data.code_tasks import TOPICS, make_tasks
from bench.data.label_free import scores_of
from bench.data.maths import make_maths
from bench.data.problems import Problem, make_problems, read_problems
from core.plotting import COLOURS, figure, png
from data.filter.audit.separation import Estimate, auc, estimate, length_buckets

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "filter_difficulty.png"
KINDS = {"counted steps": make_problems, "mathematics": make_maths, "code": make_tasks}
HELD_OUT = {
    "counted steps": ("ages", "program"),
    "mathematics": ("number theory", "sequences", "probability"),
    "code": TOPICS,
}
COUNT, SEEDS, BUCKETS, ENOUGH = 800, (1, 2, 3), 8, 0.55

Found = dict[str, dict[str, Estimate]]
"""Each scorer's AUC, by the length that defines buckets."""


def measure(problems: Sequence[Problem], small_models: bool, families: Sequence[str] | None = None) -> Found:
    """Return the AUC of every scorer in buckets by the length of the answer and of the prompt. The scorers see
    all problems; only those of `families` count (None: all).
    """
    labels = np.array([problem.label for problem in problems])
    names, domains = np.unique([problem.family for problem in problems], return_inverse=True)
    chosen = np.isin(domains, [n for n, name in enumerate(names) if families is None or name in families])
    scores = scores_of(problems, small_models)
    found = {}
    for basis in ("length", "length of the prompt"):
        buckets = domains * BUCKETS
        for domain in range(len(names)):
            mine = domains == domain
            buckets[mine] += length_buckets(scores[basis][mine].astype(np.int64), BUCKETS)
        shown = {name: values[chosen] for name, values in scores.items()}
        found["answer" if basis == "length" else "prompt"] = auc(shown, labels[chosen], buckets[chosen])
    return found


def mean_over_seeds(parts: Sequence[Found]) -> Found:
    """Return the mean areas; seeds are independent, so are their resamples."""

    def mean(cells: Sequence[Estimate]) -> Estimate:
        return estimate(np.mean([[cell.value, *cell.resampled] for cell in cells], axis=0))

    first = parts[0]
    return {basis: {name: mean([part[basis][name] for part in parts]) for name in first[basis]} for basis in first}


def table(found: Mapping[str, Found]) -> str:
    lines = []
    for basis in next(iter(found.values())):
        lines += [f"\nBuckets by domain and length of the {basis}:\n", f"| scorer | {' | '.join(found)} |"]
        lines.append("|---" * (len(found) + 1) + "|")
        for scorer in next(iter(found.values()))[basis]:
            cells = [part[basis][scorer] for part in found.values()]
            figures = " | ".join(f"{cell.value:.2f} ({cell.low:.2f} to {cell.high:.2f})" for cell in cells)
            lines.append(f"| {scorer} | {figures} |")
    return "\n".join(lines)


def winners(found: Mapping[str, Found]) -> list[str]:
    """Return the scorers whose lower bound exceeds `ENOUGH` on every kind, in both sorts of buckets."""
    first = next(iter(next(iter(found.values())).values()))
    return [
        name for name in first if all(cells[name].low > ENOUGH for kind in found.values() for cells in kind.values())
    ]


def draw(found: Mapping[str, Found], path: Path) -> None:
    from matplotlib.ticker import MultipleLocator

    first = next(iter(found.values()))
    names = list(next(iter(first.values())))
    with figure(11, 1.4 + 0.28 * len(names), 1, len(first), sharex=True, sharey=True) as (made, panels):
        for axes, basis in zip(panels, first, strict=True):
            for index, (kind, part) in enumerate(found.items()):
                cells = [part[basis][scorer] for scorer in names]
                areas = np.array([cell.value for cell in cells])
                ends = np.array([[cell.value - cell.low, cell.high - cell.value] for cell in cells]).T
                places = np.arange(len(names)) + 0.22 * (index - (len(found) - 1) / 2)
                axes.errorbar(areas, places, xerr=ends, fmt="o", markersize=4, color=COLOURS[index], label=kind)
            axes.axvline(0.5, color="black", linewidth=0.8)
            axes.axvline(ENOUGH, color="grey", linewidth=0.8, linestyle=":")
            axes.set(title=f"buckets by the length of the {basis}")
            axes.set_yticks(np.arange(len(names)), names)
            axes.xaxis.set_major_locator(MultipleLocator(0.1))
        panels[0].invert_yaxis()
        panels[-1].legend(frameon=False, loc="upper right")
        made.supxlabel("probability that the harder of two problems in one bucket scores higher (AUC), 95% interval")
        path.write_bytes(png(made))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.data.difficulty", description=__doc__)
    parser.add_argument("--set", type=Path, help="a labelled set: JSON lines with prompt, response and label")
    parser.add_argument("--count", type=int, default=COUNT, help="problems per kind and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument(
        "--small-models", action="store_true", help="train small models too (a minute of CPU time per set)"
    )
    parser.add_argument("--picture", type=Path, help=f"file for the plot (docs/{PICTURE.name}; with --set, none)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Found] = {}
    if chosen.set is not None:
        torch.manual_seed(0)
        found[chosen.set.name] = measure(read_problems(chosen.set), chosen.small_models)
    for kind, make in KINDS.items() if chosen.set is None else ():
        parts = []
        for seed in chosen.seeds:
            begin = time.monotonic()
            torch.manual_seed(seed)
            parts.append(measure(make(chosen.count, seed), chosen.small_models, HELD_OUT[kind]))
            print(f"{kind}, seed {seed}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
        found[kind] = mean_over_seeds(parts)
    print(table(found))
    picture = chosen.picture or (PICTURE if chosen.set is None else None)
    if picture is not None:
        draw(found, picture)
        print(f"\ndrawn: {picture}")
    print(f"\nlower bound above {ENOUGH} everywhere: {', '.join(winners(found)) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
