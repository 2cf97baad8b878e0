"""Look for the documents of the evaluation harness's tasks in the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from data.filter.screen.contamination import strings_of
from data.filter.screen.normalise import words
from train.overlap.search import not_looked_for, search_for_model


def search_samples(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], model: Path, files: str | None, limit: int
) -> dict[str, dict[str, Any]]:
    """Return for each task what `Overlap.beside` says, with the means of its metrics over the documents that are in the
    text (`score_found`) and over the others (`score_clean`), by metric.

    Files that cannot be read are said in the place of a result, since the tasks are done.

    `samples`: those that the harness logs. Every string of a document counts, as in the filter. The other arguments
    are those of `search_for_model`.
    """
    texts = {task: {str(one["doc_id"]): _strings(one["doc"]) for one in logged} for task, logged in samples.items()}
    try:
        overlaps, why = search_for_model(texts, model, files, limit)
    except ConfigError as error:  # a file that is damaged further on
        overlaps, why = {}, str(error)
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


def _strings(document: Any) -> list[str]:
    """Return the strings of a document, the longest first: which of them is the question is not known."""
    return sorted(strings_of(document), key=lambda text: -len(words(text)))


def _metrics(logged: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return the value of each metric (with its filter) by document. A metric that is no mean of numbers is absent."""
    found: dict[str, dict[str, float | None]] = {}
    for one in logged:
        for metric in one.get("metrics", []):
            value = one.get(metric)
            if isinstance(value, bool | int | float):
                found.setdefault(f"{metric},{one.get('filter', 'none')}", {})[str(one["doc_id"])] = float(value)
    return found
