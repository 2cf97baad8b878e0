"""Render an audit as one HTML page. The template escapes all data."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from core.html import data_url, render
from data.filter.audit.findings import named, reason_label, text_only
from data.filter.audit.plots import thresholds
from data.filter.audit.statistics import by_size, share
from data.filter.input.records import Reason

_ROWS = 40
"""Maximum number of domains in a table; audit.json has all domains."""
_SHARES = ("share_before", "share_after")
_MEANING = {
    "hard": "A high score means hard; low scores are dropped.",
    "improbable": "A high score means improbable to a model, which need not mean hard; low scores are dropped.",
    "learnable": "A high score means learnable and not yet learnt; low scores are dropped.",
    "quality": "A high score means better text, which may be easy; low scores are dropped.",
    "control": "The scorer is a control: a high score means nothing; low scores are dropped.",
    "mixed": "The members of the ensemble mean different things by a high score; low scores are dropped.",
}


def audit_page(
    audit: dict[str, Any], light: dict[str, bytes], dark: dict[str, bytes], directory: str, command: str
) -> str:
    """Render the page. `light` and `dark` are the plots for either colour scheme."""
    totals, domains = audit["totals"], audit["domains"]
    whole, kept, competed = (totals[name] for name in ("in", "kept", "competed"))
    reasons = [
        (Reason[name], size, share(size["tokens"], whole["tokens"]))
        for name, size in audit["reasons"].items()
        if size["documents"]
    ]
    largest = by_size(domains)
    captions = {"scores": "Scores of the records that passed the gates", "proof": "AUC, and kept fraction by label"}
    captions |= {f"scores_{place}": named(name) for place, name in enumerate(audit["scores"]["domains"])}

    def shown(name: str) -> tuple[str, bool, str, str]:
        return captions[name], name in ("scores", "proof"), data_url(light[name]), data_url(dark[name])

    return render(
        Path(__file__).with_name("page.html"),
        _FILTERS,
        _visible,
        title=f"Filter: {audit['input']}",
        audit=audit,
        meaning=_MEANING[audit["scorer"]["direction"]],
        text_only=text_only(audit),
        tiles=[
            ("documents kept", kept["documents"], whole["documents"]),
            ("tokens kept", kept["tokens"], whole["tokens"]),
            ("tokens dropped by score", competed["tokens"] - kept["tokens"], whole["tokens"]),
            ("tokens dropped before scoring", whole["tokens"] - competed["tokens"], whole["tokens"]),
        ],
        reasons=reasons,
        label=partial(reason_label, audit),
        largest_reason=max((part or 0 for *_, part in reasons), default=0) or 1,
        unit=audit["rules"]["unit"],
        domains=[(name, domains[name], thresholds(audit, name)) for name in largest[:_ROWS]],
        more_domains=len(domains) - _ROWS,
        largest_domain=max((one[key] or 0 for one in domains.values() for key in _SHARES), default=0) or 1,
        pictures={name: shown(name) for name in light},
        random=audit["random"],
        groups=_groups(audit["random"], largest),
        samples=[(name, sides) for name, sides in audit["samples"].items() if any(sides.values())],
        examples=[(Reason[name], rows) for name, rows in audit["examples"].items()],
        look_up=f"leviathan filter explain=ID out={shlex.quote(directory)}",
        command=command,
        rules=yaml.safe_dump({key: audit[key] for key in ("rules", "scorer")}, sort_keys=False, allow_unicode=True),
    )


def _groups(random: dict[str, Any], domains: list[str]) -> list[tuple[str, float | None]]:
    """Return a label and the kept fraction for each of the largest domains and each quarter of records by length."""
    groups = [(named(name), random["domains"][name]) for name in domains if name in random["domains"]]
    groups = groups[:_ROWS] if len(groups) > 1 else []
    return groups + [(f"{q['from_bytes']:,} to {q['to_bytes']:,} scored bytes", q["kept"]) for q in random["lengths"]]


def _visible(value: Any) -> Any:
    """Put U+FFFD in place of characters that are invisible or change the direction of text. Markup is not changed."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)


_FILTERS = {
    "named": named,
    "over": share,
    "describe": lambda reason, detail: Reason[reason].describe(detail),
    "count": lambda value: f"{value:,}",
    "percent": lambda share: "-" if share is None else f"{share:.1%}",
    "correlation": lambda value: "-" if value is None else f"{value:+.2f}",
    "number": lambda value: "-" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}",
    "auc": lambda value: f"{value:.2f}",
}
