"""Look for the documents of the evaluation harness's tasks in the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.filter.screen.contamination import strings_of
from train.overlap.search import not_looked_for, search_for_model


def search_samples(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], model: Path, files: str | None, limit: int
) -> dict[str, dict[str, Any]]:
    """Return for each task what `Overlap.beside` says, with the means of its metrics over the documents that are in the
    text (`score_found`) and over the others (`score_clean`), by metric.

    `samples`: those that the harness logs. Every string of a document counts, as in the filter. The other arguments
    are those of `search_for_model`.
    """
    texts = {
        task: {str(one["doc_id"]): list(strings_of(one["doc"])) for one in logged} for task, logged in samples.items()
    }
    overlaps, why = search_for_model(texts, model, files, limit)
    results = {}
    for task, logged in samples.items():
        if task not in overlaps:
            results[task] = not_looked_for(why)
            continue
        by_metric = {name: overlaps[task].beside(scores) for name, scores in _metrics(logged).items()}
        results[task] = overlaps[task].beside(dict.fromkeys(texts[task]))
        for key in ("score_found", "score_clean"):
            results[task][key] = {name: beside[key] for name, beside in by_metric.items()}
    return results


def _metrics(logged: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return the value of each metric (with its filter) by document. A metric that is no mean of numbers is absent."""
    found: dict[str, dict[str, float | None]] = {}
    for one in logged:
        for metric in one.get("metrics", []):
            value = one.get(metric)
            if isinstance(value, bool | int | float):
                found.setdefault(f"{metric},{one.get('filter', 'none')}", {})[str(one["doc_id"])] = float(value)
    return found
