"""The audit as one page, from its figures alone. All that comes from the data is escaped."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import yaml

from core.errors import DataError
from core.files import write_json, write_text
from core.html import data_url, page
from data.filter.audit.findings import named
from data.filter.audit.plots import DROPPED, KEPT, draw, thresholds
from data.filter.input.records import Reason

FIGURES, PAGE = "audit.json", "audit.html"
_ROWS = 40
"""Domains in a table; the rest are in the figures."""
_SAYS = {
    "hard": "kept for its score",
    "revived": "kept by lot, out of what is easy",
    "protected": "kept whatever its score",
    "easy": "score below the threshold",
    "noise": "harder than clean text ever is",
    "unscored": "the scorer gave no number",
    "malformed": "could not be read",
    "empty": "no text",
    "duplicate": "copy of another record",
    "near_duplicate": "nearly a copy of another record",
    "contaminated": "shares a passage with an evaluation set",
    "non_text": "not text",
    "repetitive": "repeats itself",
    "scrambled": "letters in no order that text has",
    "language": "in another language",
    "too_short": "too short",
    "too_long": "too long",
}
_MEANS = {
    "hard": "A high score means hard; what scores low is left out.",
    "learnable": "A high score means worth learning and not yet learnt; what scores low is left out.",
}


def write_audit(audit: dict[str, Any], directory: Path, command: str) -> None:
    """Write audit.json, then audit.html. `command`: what repeats the filter. Raises `DataError` on a full disk."""
    try:
        write_json(directory / FIGURES, audit)
        write_text(directory / PAGE, audit_page(audit, draw(audit), draw(audit, dark=True), str(directory), command))
    except OSError as error:
        raise DataError(
            f"cannot write the audit to {directory} ({error.strerror}): free some space, run again"
        ) from None


def audit_page(
    audit: dict[str, Any], light: dict[str, bytes], dark: dict[str, bytes], directory: str, command: str
) -> str:
    """The page; `light` and `dark` are the pictures in either ink."""
    parts = [
        f"<h1>Filter: {_text(audit['input'])}</h1>",
        f"<p class=when>by {_text(audit['scorer']['name'])}: {_text(audit['scorer']['measures'])}. "
        f"{_MEANS[audit['scorer']['direction']]}</p>",
        _summary(audit),
        _warnings(audit),
        _reasons(audit),
        _domains(audit),
        _pictures(audit, light, dark),
        _lot(audit),
        _agreement(audit),
        _samples(audit),
        _examples(audit),
        _commands(audit, directory, command),
    ]
    return page(f"Filter: {_visible(audit['input'])}", "\n".join(filter(None, parts)), _STYLE)


def _summary(audit: dict[str, Any]) -> str:
    whole, kept, competed = (audit["totals"][name] for name in ("in", "kept", "competed"))
    gates = whole["tokens"] - competed["tokens"]
    tiles = [
        ("documents stay", kept["documents"], whole["documents"]),
        ("tokens stay", kept["tokens"], whole["tokens"]),
        ("tokens left out by their score", competed["tokens"] - kept["tokens"], whole["tokens"]),
        ("tokens left out before", gates, whole["tokens"]),
    ]
    return "<div class=tiles>{}</div>".format(
        "".join(
            f"<div><b>{_percent(_ratio(part, of))}</b><span>{what}</span><small>{part:,} of {of:,}</small></div>"
            for what, part, of in tiles
        )
    )


def _warnings(audit: dict[str, Any]) -> str:
    if not audit["warnings"]:
        return ""
    items = "".join(f"<li>{_text(warning['text'])}</li>" for warning in audit["warnings"])
    return f"<div class=warning><ul>{items}</ul></div>"


def _reasons(audit: dict[str, Any]) -> str:
    """Every reason that occurred, as a bar of its share of the tokens."""
    total = audit["totals"]["in"]
    found = {reason: size for reason, size in audit["reasons"].items() if size["documents"]}
    longest = max((_ratio(size["tokens"], total["tokens"]) or 0.0 for size in found.values()), default=1.0)
    rows = []
    for reason, size in found.items():
        share = _ratio(size["tokens"], total["tokens"])
        kind = "kept" if reason in ("hard", "revived", "protected") else "dropped"
        rows.append(
            f"<tr><td><b>{escape(reason.replace('_', ' '))}</b><br><small>{_SAYS[reason]}</small></td>"
            f"<td class=n>{size['documents']:,}</td><td class=n>{size['tokens']:,}</td>"
            f"<td class=n>{_percent(share)}</td><td class=wide-bar>{_bar(share, kind, longest or 1.0)}</td></tr>"
        )
    sum_ = f"<td class=n>{total['documents']:,}</td><td class=n>{total['tokens']:,}</td>"
    rows.append(f"<tr class=sum><td>all that was read</td>{sum_}<td></td><td></td></tr>")
    return f"<h2>What became of every record</h2>{_table(['', '#documents', '#tokens', '#share', ''], rows, 'full')}"


def _domains(audit: dict[str, Any]) -> str:
    """A row per domain, the largest first, with its share of the mix before and after."""
    every = sorted(audit["domains"].items(), key=lambda item: (-item[1]["in"]["tokens"], item[0]))
    largest = max((max(d["share_before"] or 0, d["share_after"] or 0) for _, d in every), default=1) or 1
    unit, rows = audit["rules"]["unit"], []
    for name, domain in every[:_ROWS]:
        limits = thresholds(audit, name)
        shown = _number(limits[0]) if limits else "-"
        if len(limits) > 1:
            shown += f" to {_number(limits[-1])}"
        mix = _bar(domain["share_before"], "before", largest) + _bar(domain["share_after"], "after", largest)
        cells = [
            f"{domain['in']['documents']:,}",
            f"{domain['kept']['documents']:,}",
            f"{domain['in']['tokens']:,}",
            f"{domain['kept']['tokens']:,}",
            f"{_percent(_ratio(domain['kept'][unit], domain['competed'][unit]))}<br>"
            f"<small>for {_percent(domain['target'])}</small>",
            shown,
            f"{_percent(domain['share_before'])}<br>{_percent(domain['share_after'])}",
        ]
        numbers = "".join(f"<td class=n>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{_name(name)}</td>{numbers}<td class=mix>{mix}</td></tr>")
    head = ["", "#documents", "#kept", "#tokens", "#kept", f"#rate of {unit}", "#threshold", "#mix", "before, after"]
    more = f"<p class=when>{len(every) - _ROWS:,} more in {FIGURES}.</p>" if len(every) > _ROWS else ""
    note = (
        f"<p class=when>Rate: of the {unit} that passed the gates, for the target. Mix: share of all tokens, before "
        "(grey) and after (blue). A threshold is the lowest score kept, from one length bucket to another.</p>"
    )
    noise = audit["thresholds"].get("noise")
    if noise is not None:
        note += f"<p class=when>A score above {_number(noise)} counts as noise.</p>"
    return f"<h2>Domains</h2>{_table(head, rows, 'full')}{more}{note}"


def _pictures(audit: dict[str, Any], light: dict[str, bytes], dark: dict[str, bytes]) -> str:
    if not light:
        return ""
    captions = {"scores": "Scores of what passed the gates", "length": "Score against length"}
    captions |= {f"scores_{place}": named(name) for place, name in enumerate(audit["scores"]["domains"])}
    order = sorted(light, key=lambda name: name == "length")
    figures = ""
    for name in order:
        heading = escape(_visible(captions[name]))
        figures += (
            f"<figure{' class=wide' if name in ('scores', 'length') else ''}><figcaption>{heading}</figcaption>"
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data_url(dark[name])}">'
            f'<img alt="{heading}" src="{data_url(light[name])}"></picture></figure>'
        )
    length, whole = audit["length"], audit["whole_length"]
    note = (
        f"Rank correlation of score and length: {_correlation(length['overall'])} over all, "
        f"{_correlation(length['inside_buckets'])} inside the length buckets ({length['records']:,} records). "
        "Length is that of what is scored, the answer where there is one; with that of prompt and answer it is "
        f"{_correlation(whole['overall'])} and {_correlation(whole['inside_buckets'])}."
    )
    ends = "What lies beyond a picture's ends is counted in its outermost bins."
    return f"<h2>Scores</h2><div class=pictures>{figures}</div><p class=when>{note} {ends}</p>"


def _lot(audit: dict[str, Any]) -> str:
    """The share kept of each group, beside the one share that a lot would have kept of all."""
    lot = audit["lot"]
    if lot["rate"] is None:
        return ""
    largest = sorted(lot["domains"], key=lambda name: (-audit["domains"][name]["in"]["tokens"], name))[:_ROWS]
    groups = [(_name(name), lot["domains"][name]) for name in largest] if len(largest) > 1 else []
    groups += [(f"{q['from_bytes']:,} to {q['to_bytes']:,} scored bytes", q["kept"]) for q in lot["lengths"]]
    mark = f'<i style="left:{100 * lot["rate"]:.2f}%"></i>'
    rows = [
        f"<tr><td>{name}</td><td class=n>{_percent(share)}</td>"
        f"<td class=n>{_percent(lot['rate'])}</td><td class=wide-bar><div class=against>"
        f"{_bar(share, 'kept', 1.0)}{mark}</div></td></tr>"
        for name, share in groups
    ]
    mean = lot["mean_score"]
    text = f"Mean score: {_number(mean['kept'])} of what was kept, {_number(mean['lot'])} by lot."
    head = ["", f"#{lot['unit']} kept", "#by lot", ""]
    return f"<h2>Against dropping by lot at the same rate</h2>{_table(head, rows, 'full')}<p class=when>{text}</p>"


def _agreement(audit: dict[str, Any]) -> str:
    if not audit["agreement"]:
        return ""
    rows = [
        f"<tr><td>{_text(pair['scorers'][0])}</td><td>{_text(pair['scorers'][1])}</td>"
        f"<td class=n>{_correlation(pair['correlation'])}</td><td class=n>{pair['records']:,}</td></tr>"
        for pair in audit["agreement"]
    ]
    return f"<h2>How far scorers agree</h2>{_table(['', '', '#rank correlation', '#records'], rows)}"


def _samples(audit: dict[str, Any]) -> str:
    """The records closest to the threshold, in every shown domain, on either side."""
    parts = []
    for place, (name, sides) in enumerate(audit["samples"].items()):
        tables = "".join(
            f"<h3 class={side}>{heading}</h3>{_records(sides[side], with_score=True)}"
            for side, heading in (("kept", "Just kept"), ("dropped", "Just left out"))
            if sides[side]
        )
        if tables:
            opened = " open" if place == 0 else ""
            parts.append(f"<details{opened}><summary>{_name(name)}</summary>{tables}</details>")
    return f"<h2>On either side of the threshold</h2>{''.join(parts)}" if parts else ""


def _examples(audit: dict[str, Any]) -> str:
    parts = [
        f"<details><summary>{escape(reason.replace('_', ' '))} "
        f"<small>{_SAYS[reason]}; {audit['reasons'][reason]['documents']:,} records</small></summary>"
        f"{_records(rows, with_score=any(row['score'] is not None for row in rows))}</details>"
        for reason, rows in audit["examples"].items()
    ]
    return f"<h2>Examples of every reason, by lot</h2>{''.join(parts)}" if parts else ""


def _records(rows: list[dict[str, Any]], with_score: bool) -> str:
    body = []
    for row in rows:
        score = ""
        if with_score:
            limit = row.get("threshold")
            beside = "" if limit is None else f"<br><small>threshold {_number(limit)}</small>"
            score = f"<td class=n>{_number(row['score'])}{beside}</td>"
        source = "" if row["source"] == row["id"] else f"<br><small>{_name(row['source'])}</small>"
        told = f"<b>{_text(Reason[row['reason']].describe(row['detail']))}</b><br>" if row["detail"] is not None else ""
        text = f"<td class=text>{told}{_text(row['text'])}</td>"
        source += f"<br><small>no score: {_text(row['why'])}</small>" if row.get("why") else ""
        body.append(f"<tr><td class=id>{_name(row['id'])}{source}</td>{score}{text}</tr>")
    return _table(["record", *(["#score"] if with_score else []), "text"], body, "full records")


def _commands(audit: dict[str, Any], directory: str, command: str) -> str:
    look_up = f"leviathan filter explain=ID out={shlex.quote(directory)}"
    settings = {"rules": audit["rules"], "scorer": audit["scorer"]}
    rules = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return (
        f"<h2>To look up a record</h2><pre>{_text(look_up)}</pre>"
        f"<h2>To repeat</h2><pre>{_text(command)}</pre>"
        f"<details><summary>Rules and scorer</summary><pre>{_text(rules)}</pre></details>"
    )


def _table(head: list[str], rows: Iterable[str], kind: str = "") -> str:
    """`head`: a column each; those of numbers begin with #."""
    cells = "".join(f"<th class=n>{escape(h[1:])}</th>" if h[:1] == "#" else f"<th>{escape(h)}</th>" for h in head)
    return f"<div class=scroll><table class='{kind}'><tr>{cells}</tr>{''.join(rows)}</table></div>"


def _bar(share: float | None, kind: str, longest: float) -> str:
    return f'<div class="bar {kind}" style="width:{100 * (share or 0) / longest:.2f}%"></div>'


def _text(text: str) -> str:
    """Escaped, and right-to-left text kept to itself."""
    return f"<bdi>{escape(_visible(text))}</bdi>" if text else "<small>no text</small>"


def _visible(text: str) -> str:
    """Without what no one sees and what turns the text around it, a mark in its place."""
    return "".join(c if c in _BREAKS or c.isprintable() else _REPLACED for c in text)


def _name(name: str) -> str:
    return _text(named(name))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _correlation(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


_BREAKS, _REPLACED = "\n\t", "\N{REPLACEMENT CHARACTER}"
_STYLE = f"""
:root {{ --kept: {KEPT}; --dropped: {DROPPED}; --before: #999; }}
@media (prefers-color-scheme: dark) {{ :root {{ --kept: #2b95d6; }} }}
h3 {{ margin: 1rem 0 0; font-size: 1rem; padding-left: .5rem; border-left: 4px solid var(--kept); }}
h3.dropped {{ border-color: var(--dropped); }} small {{ color: var(--faint); }} th.n {{ text-align: right; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; margin: 1.4rem 0; }}
.tiles div {{ border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem; display: grid; }}
.tiles b {{ font-size: 1.7rem; line-height: 1.3; }}
.scroll {{ overflow-x: auto; }} .full {{ width: 100%; }} tr.sum {{ font-weight: 600; }}
td.wide-bar {{ width: 40%; }} td.mix {{ min-width: 9rem; }}
.bar {{ height: .7rem; border-radius: 2px; background: var(--kept); min-width: 1px; }}
.bar.dropped {{ background: var(--dropped); }} .bar.before {{ background: var(--before); margin-bottom: .35rem; }}
.against {{ position: relative; background: var(--line); border-radius: 2px; }}
.against i {{ position: absolute; top: -.25rem; bottom: -.25rem; border-left: 2px solid currentColor; }}
details {{ margin: .5rem 0; }} summary {{ cursor: pointer; font-weight: 600; }}
.records td {{ vertical-align: top; }} .records td.id {{ width: 12rem; overflow-wrap: anywhere; font-size: 13px; }}
.records td.text {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }}
picture {{ display: block; }} img {{ border: 0; }}
"""
