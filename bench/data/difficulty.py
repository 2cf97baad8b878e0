"""Measure how well scorers separate hard from easy: `python -m bench.data.difficulty [--set P] [--picture P]`.

The data are three generated sets of problems, labelled with the number of steps to their solution, or a set of JSON
lines (`prompt`, `response`, `label`). The result for each scorer and control is the area under the ROC curve inside
length buckets, with its bootstrap interval. The default scorer's settings were chosen on seed 0; the results are for
seeds 1 to 3. The built-in corpus has no labels: for it, the scores of each domain and their correlation with length are
printed. The plot is written to `--picture`, by default in docs/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.data.problems import Problem, make_problems, read_problems, records
from core.config import build
from core.plotting import COLOURS, figure, png
from data.config import DataConfig, Section
from data.filter.audit.separation import Estimate, auc, length_buckets, spearman
from data.filter.input.records import Record
from data.filter.score.baselines import LengthScorer, RandomScorer
from data.filter.score.ensemble import EnsembleScorer
from data.filter.score.ngram import NgramScorer
from data.filter.score.scorer import Scorer
from data.sources import make_source

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "filter_difficulty.png"
COUNT, SEEDS, BUCKETS = 2000, (1, 2, 3), 8
DEFAULT, CONTROLS = "ngram", ("random", "length")
WITH_PROMPT = "length with prompt"
"""A third control, the length of prompt and answer together. The verdict leaves it out: among answers of similar
length, the length of the prompt is a strong hint at the number of steps.
"""
SECTION_BYTES = 2_000_000

Found = dict[str, dict[str, Estimate]]
"""Each scorer's AUC, by the length that defines buckets: of the answer (as in the filter), of the record, or both."""


def scorers() -> dict[str, Scorer]:
    """Return the controls, the default scorer and variants of the default."""
    return {
        "random": RandomScorer(),
        "length": LengthScorer(),
        "ngram": NgramScorer(),
        "ngram, order 3": NgramScorer(order=3),
        "ngram, hardest 16 bytes": NgramScorer(window=16),
        "ngram, hardest 64 bytes": NgramScorer(window=64),
        "ensemble: all and hardest 64": EnsembleScorer([NgramScorer(), NgramScorer(window=64)]),
    }


def measure(problems: Sequence[Problem]) -> Found:
    data = records(problems)
    labels = np.array([problem.label for problem in problems])
    by_answer = LengthScorer().score(data)
    by_record = np.array([len(record.text.encode()) for record in data], np.float64)
    scores = {}
    for name, scorer in scorers().items():
        scorer.fit(lambda: data)
        scores[name] = scorer.score(data)
        if name == "length":
            scores[WITH_PROMPT] = by_record
    answer, record = (length_buckets(lengths.astype(np.int64), BUCKETS) for lengths in (by_answer, by_record))
    bases = {"the answer": answer, "prompt and answer": record, "both at once": answer * BUCKETS + record}
    return {basis: auc(scores, labels, buckets) for basis, buckets in bases.items()}


def holds(found: Found) -> bool:
    """Return whether the default scorer beats chance and both controls, at the lower ends of the 95% intervals."""
    return all(
        part[DEFAULT].low > 0.5 and all(part[DEFAULT].minus(part[control]).low > 0 for control in CONTROLS)
        for part in found.values()
    )


def margins(found: dict[str, Found]) -> str:
    """Return a table with the lower end of the 95% interval of the default scorer's lead over each control."""
    first = next(iter(found.values()))
    lines = [f"| ahead of, in buckets by the length of | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for basis in first:
        for control in (*CONTROLS, WITH_PROMPT):
            bounds = [part[basis][DEFAULT].minus(part[basis][control]).low for part in found.values()]
            lines.append(f"| {control}, {basis} | {' | '.join(f'{bound:+.3f}' for bound in bounds)} |")
    return "\n".join(lines)


def table(found: dict[str, Found]) -> str:
    lines = []
    for basis in next(iter(found.values())):
        lines += [f"\nBuckets by the length of {basis}:\n", f"| scorer | {' | '.join(found)} |"]
        lines.append("|---" * (len(found) + 1) + "|")
        for scorer in next(iter(found.values()))[basis]:
            cells = [part[basis][scorer] for part in found.values()]
            figures = " | ".join(f"{cell.value:.3f} ({cell.low:.3f} to {cell.high:.3f})" for cell in cells)
            lines.append(f"| {scorer} | {figures} |")
    return "\n".join(lines)


def draw(found: dict[str, Found], path: Path) -> None:
    from matplotlib.ticker import MultipleLocator

    first = next(iter(found.values()))
    with figure(11, 4.4, 1, len(first), sharex=True, sharey=True) as (made, panels):
        for axes, basis in zip(panels, first, strict=True):
            names = list(first[basis])
            for index, (name, part) in enumerate(found.items()):
                cells = [part[basis][scorer] for scorer in names]
                areas = np.array([cell.value for cell in cells])
                ends = np.array([[cell.value - cell.low, cell.high - cell.value] for cell in cells]).T
                places = np.arange(len(names)) + 0.22 * (index - (len(found) - 1) / 2)
                axes.errorbar(areas, places, xerr=ends, fmt="o", markersize=4, color=COLOURS[index], label=name)
            axes.axvline(0.5, color="black", linewidth=0.8)
            axes.set(title=f"by the length of {basis}")
            axes.set_yticks(np.arange(len(names)), names)
            axes.xaxis.set_major_locator(MultipleLocator(0.05))
        panels[0].invert_yaxis()
        panels[-1].legend(frameon=False, loc="upper right")
        made.supxlabel("chance that the harder of two problems in one length bucket scores higher (AUC), 95% interval")
        path.write_bytes(png(made))


def builtin() -> dict[str, list[Record]]:
    """Return the first documents of each section of the built-in corpus."""
    found = {}
    for section in Section:
        source = {"kind": "builtin", "section": section.name, "max_bytes": SECTION_BYTES}
        config = build(DataConfig, {"sources": {section.name: source}}, "data")
        documents = make_source(section.name, config.sources[section.name], config).documents()
        texts = [document.text for document in documents if not document.dropped]
        found[section.name] = [Record(f"{section.name}{n}", section.name, "", text) for n, text in enumerate(texts)]
    return found


def corpus_table() -> str:
    sections = builtin()
    everything = [record for part in sections.values() for record in part]
    scorer = NgramScorer()
    scorer.fit(lambda: everything)
    lines = [
        "| domain | documents | nats per byte: 10%, median, 90% | rank correlation with length |",
        "|---|---|---|---|",
    ]
    for name, part in {**sections, "all": everything}.items():
        scores, lengths = scorer.score(part), LengthScorer().score(part)
        low, middle, high = np.quantile(scores, [0.1, 0.5, 0.9])
        figures = f"{low:.2f}, {middle:.2f}, {high:.2f} | {spearman(scores, lengths) or 0.0:+.2f}"
        lines.append(f"| {name} | {len(part):,} | {figures} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.data.difficulty", description=__doc__)
    parser.add_argument("--set", type=Path, help="a labelled set: JSON lines with prompt, response and label")
    parser.add_argument("--count", type=int, default=COUNT, help="problems per seed")
    parser.add_argument("--picture", type=Path, help=f"file for the plot (docs/{PICTURE.name}; with --set, none)")
    chosen = parser.parse_args(arguments)
    if chosen.set is not None:
        found = {chosen.set.name: measure(read_problems(chosen.set))}
    else:
        found = {f"seed {seed}": measure(make_problems(chosen.count, seed)) for seed in SEEDS}
    print(table(found))
    print(f"\nLower end of the 95% interval of {DEFAULT}'s lead:\n\n{margins(found)}")
    picture = chosen.picture or (PICTURE if chosen.set is None else None)
    if picture is not None:
        draw(found, picture)
        print(f"\ndrawn: {picture}")
    if chosen.set is None:
        print(f"\nBuilt-in corpus, {DEFAULT}:\n\n{corpus_table()}\n")
    verdicts = {name: holds(part) for name, part in found.items()}
    print(f"{DEFAULT} is better than chance and than the controls {' and '.join(CONTROLS)}: {verdicts}")
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
