"""Compute the statistics of a filter run: what was dropped and why, what was kept, and warnings.

`Audit` takes the shards of the selection one by one, in any order. The same decisions give the same statistics, byte
for byte. Counts by reason and by domain must add up to the documents and tokens that were read.

Counts of documents, tokens and bytes by reason and domain are exact. Histograms, means, quantiles, correlations and the
kept fractions by length are those of a random sample of 50,000 records that competed, and kept fractions by label those
of as many with labels.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import numpy as np

from core.config import plain
from core.errors import DataError
from data.filter.audit.findings import warnings
from data.filter.audit.proof import by_length
from data.filter.audit.separation import NO_SCORES, OTHER, Numbers, first_of_each, rank_correlation, rounded, spearman
from data.filter.config import FilterRules
from data.filter.input.records import LABEL, Reason
from data.filter.score.scorer import Scorer

SHOWN_DOMAINS = 12
"""Number of domains with their own histogram and samples: those with the most tokens."""
COMPETED = (Reason.hard, Reason.revived, Reason.protected, Reason.easy, Reason.noise, Reason.unscored)
"""Reasons of records that passed the screen; `keep` is a fraction of these records."""

_SAMPLE, _SIDE, _EXAMPLES, _CHARACTERS = 50_000, 10, 5, 300
_SHOWN = {"id", "domain", "source", "reason", "detail", "tokens", "score", "threshold", "why", "text", "thumbnails"}
_THUMBNAILS = 240
"""Number of small pictures in an audit, of a few kilobytes each."""
_BINS = 40
_LEVELS = 10  # distinct labels up to which each has its own kept fraction
_FEW = 30  # records in a length bucket below which a correlation is meaningless
_OUTER = 0.0005  # fraction of scores at either end that lies beyond the axes of the plots
_AT_RANDOM = (("tie", "ascending"), ("id", "ascending"), ("source", "ascending"))
_SIZES = ("documents", "tokens", "bytes")
_SUMMED = (*_SIZES, "scored", "pictures", "pictured")
_COUNTED = {**dict.fromkeys(_SUMMED, "sum"), "longest": "max", "least": "min", "most": "max"}
_COLUMNS = {
    **dict.fromkeys(("id", "domain", "source", "reason", "detail", "why"), "string"),
    **dict.fromkeys(("tokens", "bytes", "scored_bytes"), "int64"),
    **dict.fromkeys(("score", LABEL), "float64"),
    **{"tie": "uint64", "bucket": "int32", "kept": "bool"},
}

TextOf = Callable[[str, int], str]
"""Returns the text of a record, given its shard and row; "" for a record without text."""
ThumbnailsOf = Callable[[str, int], list[bytes]]
"""Returns small JPEGs of the first pictures of a record, given its shard and row."""
Row = dict[str, Any]


class Audit:
    """Take every shard once (`add`), then return the statistics (`finish`)."""

    def __init__(
        self,
        rules: FilterRules,
        scorer: Scorer,
        thresholds: Mapping[str, Any],
        input: str,
        documents: int,
        tokens: int,
        proof: Row | None = None,
    ) -> None:
        """`thresholds`: from `Thresholds.thresholds`. `input`: name of the input, for people. `documents`, `tokens`:
        the numbers read from the input, with which the counts must agree. `proof`: from `Proof.figures`.
        """
        self.rules, self.scorer, self.thresholds = rules, scorer, thresholds
        self.input, self.proof = input, proof
        self._read = {"documents": documents, "tokens": tokens}
        self._counts: list[Any] = []
        self._sample: Any = None
        self._labelled: Any = None
        self._edges: Any = None
        self._examples: Any = None

    def add(self, shard: str, table: Any) -> None:
        """Add one shard of the selection, a `pyarrow.Table`. Raises `DataError` if the shard is inconsistent."""
        pairs = zip(table["reason"].to_pylist(), table["kept"].to_pylist(), strict=True)
        for reason, kept in sorted(set(pairs), key=str):
            if reason not in Reason.__members__ or Reason[reason].kept != kept:
                raise DataError(f"audit: {shard} has a record with reason={reason} and kept={kept}")
        table = _prepared(shard, table)
        self._counts.append(_counted([table]))
        self._examples = first_of_each([self._examples, table], ["reason"], _AT_RANDOM, _EXAMPLES)
        competed = _with_reason(table, COMPETED)
        labelled = competed.filter(competed[LABEL].is_valid())
        self._sample = first_of_each([self._sample, competed], [], _AT_RANDOM, _SAMPLE)
        self._labelled = first_of_each([self._labelled, labelled], [], _AT_RANDOM, _SAMPLE)
        by_score = _with_reason(competed.filter(competed["score"].is_valid()), (Reason.hard, Reason.easy))
        by_score = by_score.append_column("threshold", [self._thresholds(by_score)])
        distance = np.abs(by_score["score"].to_numpy() - by_score["threshold"].to_numpy())
        by_score = by_score.append_column("distance", [distance])
        nearest = (("distance", "ascending"), *_AT_RANDOM)
        self._edges = first_of_each([self._edges, by_score], ["domain", "kept"], nearest, _SIDE)

    def _thresholds(self, table: Any) -> Numbers:
        """Return the lowest kept score of each record's bucket, NaN for a bucket of which nothing is kept."""
        domains = self.thresholds.get("domains", {})
        limits = {name: [one["score"] for one in given["buckets"]] for name, given in domains.items()}
        places = zip(table["domain"].to_pylist(), table["bucket"].to_pylist(), strict=True)
        return np.array([limits[name][max(bucket, 0)] if name in limits else None for name, bucket in places], float)

    def finish(self, text_of: TextOf, thumbnails_of: ThumbnailsOf | None = None) -> dict[str, Any]:
        """Return the statistics, ready for JSON. Raises `DataError` if they do not add up to the input.

        `thumbnails_of`: None without pictures.
        """
        rows = _counted(self._counts).sort_by([("domain", "ascending"), ("reason", "ascending")]).to_pylist()
        totals = _totals(rows)
        total, competed, kept = totals["in"], totals["competed"], totals["kept"]
        domains = {name: self._domain(mine, total, kept) for name, mine in _grouped(rows, "domain").items()}
        shown = by_size(domains)[:SHOWN_DOMAINS]
        sample = self._sample.filter(self._sample["score"].is_valid())
        in_buckets = by_length(self.rules.select, self.scorer.name, lambda: self.proof, list(domains))
        without_length = [name for name, mine in zip(domains, in_buckets, strict=True) if not mine]
        audit: dict[str, Any] = {
            "format": 2,
            "input": self.input,
            "scorer": {key: getattr(self.scorer, key) for key in ("name", "measures")}
            | {"direction": self.scorer.direction.name, "fingerprint": self.scorer.fingerprint},
            "totals": totals,
            "warnings": [],
            "reasons": _by_reason(rows),
            "domains": domains,
            "scores": _histograms(sample, shown),
            "length": _length_figures(sample, "scored_bytes"),
            "whole_length": _length_figures(sample, "bytes"),
            "agreement": _agreement(sample, self.scorer.name),
            "buckets": {"rule": self.rules.select.buckets.name, "without_length": without_length},
            "proof": self.proof and self.proof | {"kept": _kept_by_label(self._labelled)},
            "random": self._against_random(domains, competed, kept),
            "thresholds": self.thresholds,
            "rules": plain(self.rules),
            **self._records(shown, text_of, thumbnails_of),
        }
        if thumbnails_of is not None:
            audit["pictures"] = {
                "records": sum(row["pictured"] for row in rows),
                "in": sum(row["pictures"] for row in rows),
                "kept": sum(row["pictures"] for row in rows if Reason[row["reason"]].kept),
            }
        self._check_sums(audit)
        return audit | {"warnings": warnings(audit)}

    def _check_sums(self, audit: dict[str, Any]) -> None:
        parts_of = {"reasons": audit["reasons"].values(), "domains": [one["in"] for one in audit["domains"].values()]}
        for what, parts in parts_of.items():
            for unit, whole in self._read.items():
                if (added := sum(size[unit] for size in parts)) != whole:
                    raise DataError(f"audit: the {what} add up to {added:,} {unit}, but {whole:,} were read")

    def _domain(self, rows: list[Row], total: dict[str, int], kept: dict[str, int]) -> dict[str, Any]:
        name, select = rows[0]["domain"], self.rules.select
        competed = [row for row in rows if Reason[row["reason"]] in COMPETED]
        scores = {row[key] for row in competed for key in ("least", "most")} - {None}
        sizes = _totals(rows)
        return sizes | {
            "target": 1.0 if name in select.protect else select.domains.get(name, self.rules.keep),
            "longest": max((row["longest"] for row in competed), default=0),
            "scored": sum(row["scored"] for row in competed),
            "constant": len(scores) == 1,
            "reasons": {reason: size for reason, size in _by_reason(rows).items() if size["documents"]},
            "share_before": share(sizes["in"]["tokens"], total["tokens"]),
            "share_after": share(sizes["kept"]["tokens"], kept["tokens"]),
        }

    def _against_random(self, domains: dict[str, Any], competed: dict[str, int], kept: dict[str, int]) -> Row:
        """Return the kept fraction of each domain and quarter by length. Random dropping would keep `rate` of each."""
        from pyarrow import compute

        unit = self.rules.unit.name
        return {
            "unit": unit,
            "rate": share(kept[unit], competed[unit]),
            "domains": {
                name: share(found["kept"][unit], found["competed"][unit])
                for name, found in domains.items()
                if found["competed"]["documents"]
            },
            "lengths": _length_quarters(self._sample, unit),
            "mean_score": {
                "random": rounded(compute.mean(self._sample["score"]).as_py()),
                "kept": rounded(compute.mean(self._sample.filter(self._sample["kept"])["score"]).as_py()),
            },
        }

    def _records(self, shown: list[str], text_of: TextOf, thumbnails_of: ThumbnailsOf | None) -> dict[str, Any]:
        """Return samples on either side of the thresholds, and examples of every reason, with their texts. With
        pictures they have `thumbnails`, JPEGs in base64, at most `_THUMBNAILS` in all: examples first.
        """
        names = {True: "kept", False: "dropped"}
        edges = _grouped(self._edges.to_pylist(), "domain")
        sides = {name: _grouped(edges.get(name, []), "kept") for name in shown}
        samples = {name: {names[side]: found.get(side, []) for side in names} for name, found in sides.items()}
        examples = _grouped(self._examples.to_pylist(), "reason")
        examples = {reason.name: examples[reason.name] for reason in Reason if reason.name in examples}
        rows = [row for found in examples.values() for row in found]
        rows += [row for found in samples.values() for side in found.values() for row in side]
        texts, thumbnails = {}, {}
        for place in sorted({(row["shard"], row["row"]) for row in rows}):  # each shard is read once
            texts[place] = text_of(*place)
            thumbnails[place] = None if thumbnails_of is None else thumbnails_of(*place)
        left = _THUMBNAILS
        for row in rows:
            place = row.pop("shard"), row.pop("row")
            row["text"] = texts[place][:_CHARACTERS].encode("utf-8", "replace").decode()  # may hold lone surrogates
            if (jpegs := thumbnails[place]) is not None:
                row["thumbnails"] = [base64.b64encode(jpeg).decode() for jpeg in jpegs[:left]]
                left -= len(jpegs[:left])
            row |= {name: rounded(row[name]) for name in ("score", "threshold") if name in row}
            for name in row.keys() - _SHOWN | ({"why"} if row["why"] is None else set()):
                del row[name]
        return {"samples": samples, "examples": examples}


def _prepared(shard: str, table: Any) -> Any:
    """Cast the columns of a shard to their types and add derived ones. A missing score is null, not NaN."""
    import pyarrow
    from pyarrow import compute

    columns = {}
    others = dict.fromkeys((name for name in table.column_names if name.startswith(OTHER)), "float64")
    for name, kind in (_COLUMNS | others).items():
        column = (table[name] if name in table.column_names else pyarrow.nulls(len(table))).cast(kind)
        if kind == "float64":
            values = column.to_numpy(zero_copy_only=False)
            column = pyarrow.array(values, mask=~np.isfinite(values))
        # may be null for an unreadable record
        columns[name] = compute.fill_null(column, "") if name in ("id", "domain", "source") else column
    pictures = np.zeros(len(table), np.int64)
    if "pictures" in table.column_names:
        pictures = compute.list_value_length(table["pictures"]).to_numpy().astype(np.int64)
    derived = {
        "pictures": pictures,
        "pictured": (pictures > 0).astype(np.int64),
        "documents": np.ones(len(table), np.int64),
        "scored": columns["score"].is_valid().cast("int64"),
        "least": columns["score"],
        "most": columns["score"],
        "longest": columns["tokens"],
        "shard": pyarrow.array([shard] * len(table), pyarrow.string()),
        "row": np.arange(len(table)),
    }
    return pyarrow.table(columns | derived)


def _counted(tables: list[Any]) -> Any:
    """Sum the sizes of records by domain and reason. Tables may hold records or such sums."""
    import pyarrow

    found = pyarrow.concat_tables(tables, promote_options="default").group_by(["domain", "reason"])
    return found.aggregate(list(_COUNTED.items())).rename_columns(
        {f"{name}_{how}": name for name, how in _COUNTED.items()}
    )


def _with_reason(table: Any, reasons: Iterable[Reason]) -> Any:
    import pyarrow
    from pyarrow import compute

    return table.filter(compute.is_in(table["reason"], pyarrow.array([reason.name for reason in reasons])))


def by_size(domains: Mapping[str, Row]) -> list[str]:
    """Return the names of the domains, those with the most tokens first."""
    return sorted(domains, key=lambda name: (-domains[name]["in"]["tokens"], name))


def _sizes(rows: Iterable[Row], reasons: Container[Reason] = tuple(Reason)) -> dict[str, int]:
    mine = [row for row in rows if Reason[row["reason"]] in reasons]
    return {name: sum(row[name] for row in mine) for name in _SIZES}


def _totals(rows: list[Row]) -> dict[str, Any]:
    kept = [reason for reason in Reason if reason.kept]
    return {"in": _sizes(rows), "competed": _sizes(rows, COMPETED), "kept": _sizes(rows, kept)}


def _by_reason(rows: list[Row]) -> dict[str, dict[str, int]]:
    return {reason.name: _sizes(rows, [reason]) for reason in Reason}


def _grouped(rows: list[Row], key: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def share(part: float, whole: float) -> float | None:
    return rounded(part / whole) if whole else None


def _histograms(sample: Any, shown: list[str]) -> dict[str, Any]:
    """Count documents and kept documents by score, overall and for the shown domains, with common bin edges."""
    if not len(sample):
        return {"edges": [], "overall": None, "domains": {}}
    score, domain, kept = (np.asarray(sample[name]) for name in ("score", "domain", "kept"))
    edges = _score_edges(score)
    inner = np.clip(score, edges[0], edges[-1])  # those beyond count in the outermost bins

    def histogram(mine: Any) -> dict[str, Any]:
        documents, stay = (np.histogram(inner[rows], edges)[0].tolist() for rows in (mine, mine & kept))
        return {"documents": documents, "kept": stay, "median": rounded(_quantile(score[mine], 0.5))}

    return {
        "edges": [rounded(float(edge)) for edge in edges],
        "overall": histogram(np.ones(len(score), bool)),
        "domains": {name: histogram(domain == name) for name in shown if (domain == name).any()},
    }


def _quantile(values: Numbers, share: Any) -> Any:
    return np.quantile(values, share, method="inverted_cdf")


def _score_edges(values: Numbers) -> Numbers:
    low, high = _quantile(values, [_OUTER, 1 - _OUTER])
    if high <= low:
        margin = max(0.5, abs(low) * 0.01)
        low, high = low - margin, high + margin
    return np.linspace(low, high, _BINS + 1)


def _length_quarters(sample: Any, unit: str) -> list[Row]:
    """Divide the records into quarters by length in scored bytes. Return the kept fraction of each."""
    length = sample["scored_bytes"].to_numpy()
    part = np.searchsorted(_quantile(length, [0.25, 0.5, 0.75]), length, "left") if len(length) else length
    found = _kept_by(part, length, sample, unit)
    return [{"from_bytes": one.pop("from"), "to_bytes": one.pop("to"), **one} for one in found]


def _kept_by_label(sample: Any) -> list[Row]:
    """Return the kept fraction of the records with each label, or of each fifth by label with more than `_LEVELS`."""
    label = sample[LABEL].to_numpy()
    part = np.unique(label, return_inverse=True)[1]
    if part.max(initial=0) >= _LEVELS:
        part = np.searchsorted(_quantile(label, [0.2, 0.4, 0.6, 0.8]), label, "left")
    return _kept_by(part, label, sample, "documents")


def _kept_by(part: Any, values: Any, sample: Any, unit: str) -> list[Row]:
    """Return the range of `values` and the kept fraction of each part of the sample."""
    sizes, kept = sample[unit].to_numpy(), np.asarray(sample["kept"])
    return [
        {
            "from": values[mask].min().item(),
            "to": values[mask].max().item(),
            "documents": int(mask.sum()),
            "kept": share(int(sizes[mask & kept].sum()), int(sizes[mask].sum())),
        }
        for mask in (part == place for place in np.unique(part))
    ]


def _length_figures(sample: Any, column: str) -> dict[str, Any]:
    """Compute the rank correlation of score and length in the sample, overall and inside the length buckets."""
    score, length, bucket = (sample[name].to_numpy().astype(np.float64) for name in ("score", column, "bucket"))
    names, domain = np.unique(np.asarray(sample["domain"]).astype(str), return_inverse=True)
    _, place, count = np.unique([domain, bucket], axis=1, return_inverse=True, return_counts=True)
    enough = (bucket >= 0) & (count[place] >= _FEW)

    def figures(mine: Any) -> dict[str, Any]:
        inside = mine & enough
        found = rank_correlation({"": score[inside]}, length[inside], place[inside], 0)[""].value
        overall = rounded(spearman(score[mine], length[mine]))
        return {"records": int(mine.sum()), "overall": overall, "inside_buckets": rounded(found)}

    domains = {str(name): figures(domain == number) for number, name in enumerate(names)}
    return figures(np.ones(len(score), bool)) | {"domains": domains}


def _agreement(sample: Any, name: str) -> list[dict[str, Any]]:
    """Compute the rank correlation of every pair of scorers over the records that both have scored."""
    if not len(sample):
        return []
    scores = {name: sample["score"].to_numpy()}
    others = (c for c in sorted(sample.column_names) if c.startswith(OTHER) and c not in NO_SCORES)
    scores |= {c.removeprefix(OTHER): sample[c].to_numpy() for c in others}
    found = []
    for first, second in itertools.combinations(scores, 2):
        both = np.isfinite(scores[first]) & np.isfinite(scores[second])
        correlation = rounded(spearman(scores[first][both], scores[second][both]))
        found.append({"scorers": [first, second], "records": int(both.sum()), "correlation": correlation})
    return found
