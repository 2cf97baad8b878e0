"""Derive warnings from the statistics of a filter run: one sentence each, with the numbers and, if known, a remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from core.errors import counted
from data.filter.audit.proof import contrast, sentence, shortcoming, verdict, why_by_length
from data.filter.input.records import Reason

SHIFT = 1.5
"""Factor by which a domain's fraction of the tokens may change without a warning."""
ALIKE = 0.7
"""Rank correlation of score and length above which a scorer mostly measures length."""
UNSCORED = 0.01
OFF_TARGET = 0.01
_UNGRADED = ("random", "length", "judge", "pass_rate")  # nothing to prove: controls, and graders themselves
_NAMED = 5  # domains that one warning names
_LABELS = {
    "learnable": {Reason.hard: "learnable", Reason.easy: "less learnable"},
    "quality": {Reason.hard: "better", Reason.easy: "worse"},
}
_ENOUGH = 50  # records in the sample below which a correlation with length is not reported


def warnings(audit: dict[str, Any]) -> list[dict[str, str]]:
    """Return warnings sorted by severity, each with `kind` (the check, for programs) and `text` (for people)."""
    checks = (malformed, unscored, constant_scores, not_proven, labels, off_target, length, mix, one_document)
    return [{"kind": check.__name__, "text": text} for check in checks for text in check(audit)]


def summary(audit: dict[str, Any]) -> str:
    """Return one line: how many records are kept, their share of the unit, and why the others are dropped."""
    whole, kept = (audit["totals"][name]["documents"] for name in ("in", "kept"))
    rate = audit["random"]["rate"]
    share = "" if rate is None else f" ({rate:.1%} of the {audit['random']['unit']} that passed the gates)"
    dropped = {Reason[name]: size["documents"] for name, size in audit["reasons"].items() if not Reason[name].kept}
    why = ", ".join(f"{count:,} {reason_label(audit, reason)}" for reason, count in dropped.items() if count)
    return f"kept {kept:,} of {counted(whole, 'record')}{share}" + (f"; dropped {why}" if why else "")


def reason_label(audit: dict[str, Any], reason: Reason) -> str:
    """Return a reason's name as shown to people, which says what the scorer measures: "hard" is not what is good."""
    return _LABELS.get(audit["scorer"]["direction"], {}).get(reason, reason.name.replace("_", " "))


def conclusion(audit: dict[str, Any]) -> Iterator[str]:
    """Yield the command's last lines on labels: the domains without length buckets, the figures if they prove the score
    (else they are a warning), and kept fractions. Without labels, say that nothing is proven, but only of prompts and
    not of graders.
    """
    yield from _buckets(audit)
    if (proof := audit["proof"]) is None:
        name, lengths = audit["scorer"]["name"], (audit["length"], audit["whole_length"])
        if name not in _UNGRADED and lengths[0] != lengths[1]:
            do = "give labels (label_key=)" + ("" if name == "learned" else " or try scorer.kind=learned")
            yield f"Nothing shows that {name} tells hard from easy here: {do}."
        return
    if verdict(proof) == "proven":
        yield f"The score tells {contrast(proof)}: {sentence(proof)}."
    if kept := proof["kept"]:
        shares = ", ".join("-" if one["kept"] is None else f"{100 * one['kept']:.0f}" for one in kept)
        first, last = kept[0]["from"], kept[-1]["to"]
        what = "levels" if all(one["from"] == one["to"] for one in kept) else "the fifths of labels from"
        yield f"kept {shares}% of " + (f"{what} {first:g} to {last:g}" if len(kept) > 1 else f"level {first:g}")


def _buckets(audit: dict[str, Any]) -> Iterator[str]:
    """With `select.buckets=auto`, say which domains compete across lengths, and why the others do not."""
    found: dict[str, list[str]] = {}
    for name, one in audit["domains"].items():
        if audit["buckets"]["rule"] == "auto" and one["competed"]["documents"]:
            why = why_by_length(audit["scorer"]["name"], audit["proof"], name)
            found.setdefault(why, []).append(named(name))
    if found:
        parts = [f"records compete across lengths in {_list(found.pop('', ['no domain']))}"]
        parts += [f"length buckets stay in {_list(names)}, since {why}" for why, names in found.items()]
        yield f"select.buckets=auto: {'; '.join(parts)}"


def _across_lengths(audit: dict[str, Any]) -> bool:
    """Return whether the labels let records of every domain compete across lengths, as `select.buckets=auto` asks."""
    competing = {name for name, one in audit["domains"].items() if one["competed"]["documents"]}
    return audit["buckets"]["rule"] == "auto" and competing <= {*audit["buckets"]["without_length"]}


def text_only(audit: dict[str, Any]) -> str | None:
    """Return a line that says which pictures no scorer has seen; None for an input without pictures."""
    if (found := audit.get("pictures")) is None:
        return None
    have = f"{counted(found['records'], 'record')} with {counted(found['in'], 'picture')}"
    return f"Scorers see the text alone: {have}, {found['kept']:,} of them kept."


def named(domain: str) -> str:
    """Return the name of a domain as shown to people. The name may be empty."""
    return domain or "(no domain)"


def malformed(audit: dict[str, Any]) -> Iterator[str]:
    count, whole = audit["reasons"]["malformed"]["documents"], audit["totals"]["in"]["documents"]
    if count:
        yield f"{counted(count, 'record')} of {whole:,} could not be read; see the examples."


def unscored(audit: dict[str, Any]) -> Iterator[str]:
    competed = audit["totals"]["competed"]["documents"]
    count = competed - sum(domain["scored"] for domain in audit["domains"].values())
    if count > UNSCORED * competed:
        advice = "With a remote scorer, the same command scores them again."
        yield f"{counted(count, 'record')} of {competed:,} have no score ({count / competed:.1%}). {advice}"


def constant_scores(audit: dict[str, Any]) -> Iterator[str]:
    found = [name for name, domain in audit["domains"].items() if domain["constant"] and domain["scored"] > 1]
    if found:
        yield f"All scores are equal, so the selection is random, in {_list(map(named, found))}."


def not_proven(audit: dict[str, Any]) -> Iterator[str]:
    if (proof := audit["proof"]) is not None and not (verdict(proof) == "length" and _across_lengths(audit)):
        yield from shortcoming(proof)


def labels(audit: dict[str, Any]) -> Iterator[str]:
    """Warn of labels that prove little."""
    if (proof := audit["proof"]) is None:
        return
    found, competing = proof["labels"], [name for name, one in audit["domains"].items() if one["competed"]["documents"]]
    if found["distinct"] == 1:
        yield f"All labels ({found['records']:,}) are equal, so no scorer can be held against them."
    elif (few := min(found["hard"], found["easy"])) < 10:
        yield f"Nearly all labels are equal: only {few:,} of {found['records']:,} are at the other end of the scale."
    if found["scales"]:
        below, above = found["scales"]
        yield f"Labels may be of two scales: none is between {below:g} and {above:g}. Give all records the same scale."
    if missing := [named(name) for name in competing if name not in proof["domains"]]:
        yield f"No record is labelled in {_list(missing)}: how good the score is there is unknown."
    if found["contradictory"]:
        count = counted(found["contradictory"], "record")
        yield f"{count} with equal texts have different labels; the mean of a text's labels counts."
    if _alike(found["length"]):
        yield f"Labels follow the length of the scored text (rank correlation {found['length']:+.2f})."


def off_target(audit: dict[str, Any]) -> Iterator[str]:
    unit, floor = audit["rules"]["unit"], audit["rules"]["select"]["floor"]
    found = []
    for name, domain in audit["domains"].items():
        kept, whole = domain["kept"][unit], domain["competed"][unit]
        one_document = 1 if unit == "documents" else domain["longest"]
        over = kept - domain["target"] * whole
        by_floor = over > 0 and domain["kept"]["documents"] <= floor
        if abs(over) > max(OFF_TARGET * whole, one_document) and not by_floor:
            found.append((abs(over), f"{named(name)} {kept / whole:.1%} instead of {domain['target']:.1%}"))
    if found:
        listed = _list(text for _, text in sorted(found, reverse=True))
        yield f"The kept fraction of {unit} is off the target: {listed}."


def length(audit: dict[str, Any]) -> Iterator[str]:
    """Warn if scores correlate with the length of the scored part, or else of the whole record."""
    scored, whole = audit["length"], audit["whole_length"]
    if _across_lengths(audit):
        return
    found = [*_length_of("length", scored), *_length_of("the length of prompt and answer", whole)]
    yield from found[:1]


def _length_of(what: str, length: dict[str, Any]) -> Iterator[str]:
    inside, groups = length["inside_buckets"], {"all records": length}
    if len(length["domains"]) > 1:
        groups |= {named(name): domain for name, domain in length["domains"].items()}
    overall = {name: group["overall"] for name, group in groups.items() if group["records"] >= _ENOUGH}
    alike = [f"{name} {value:+.2f}" for name, value in overall.items() if _alike(value)]
    text = f"Score and {what} are correlated (rank correlation: {_list(alike)})"
    if alike and inside is None:
        yield f"{text}; the filter may select by length: raise select.length_buckets."
    elif alike and _alike(inside):
        yield f"{text}, even inside the length buckets ({inside:+.2f}): the filter selects by length."
    elif alike:
        yield f"{text}; records compete inside length buckets, where it is {inside:+.2f}."
    elif _alike(inside):
        yield f"Inside the length buckets score and {what} are correlated (rank correlation {inside:+.2f})."


def mix(audit: dict[str, Any]) -> Iterator[str]:
    found = []
    for name, domain in audit["domains"].items():
        before, after = domain["share_before"], domain["share_after"]
        if before and after is not None and not before / SHIFT <= after <= before * SHIFT:
            found.append((-max(before, after), f"{named(name)} {before:.1%} before, {after:.1%} after"))
    if found:
        listed = _list(text for _, text in sorted(found))
        yield f"Fractions of tokens changed by a factor above {SHIFT}: {listed}. Source weights can restore the mix."


def one_document(audit: dict[str, Any]) -> Iterator[str]:
    found = [named(name) for name, domain in audit["domains"].items() if domain["competed"]["documents"] == 1]
    if found:
        yield f"Only one document competed in {_list(found)}: its score was compared with no other."


def _alike(correlation: float | None) -> bool:
    return correlation is not None and abs(correlation) > ALIKE


def _list(texts: Iterable[str]) -> str:
    listed = list(texts)
    more = len(listed) - _NAMED
    return ", ".join(listed[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
