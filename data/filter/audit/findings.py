"""What someone should look at in a filter's figures: one sentence each, with the numbers and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data.filter.input.records import Reason

SHIFT = 1.5
"""Factor by which a domain's share of the tokens may change."""
ALIKE = 0.7
"""Rank correlation of score and length from which a scorer is little more than length."""
UNSCORED = 0.01
OFF_TARGET = 0.01
TOKENS_PER_PARAMETER = 20
"""Data for one pass of a compute-optimal run (Hoffmann et al. 2022); with less, data is scarce."""
_NAMED = 5  # domains that one warning names
_ENOUGH = 50  # records in the sample under which a correlation with length is left alone


def warnings(audit: dict[str, Any]) -> list[dict[str, str]]:
    """In a fixed order, the gravest first. `kind` is for programs, `text` for people."""
    checks = {
        "malformed": _malformed,
        "unscored": _unscored,
        "constant_scores": _constant,
        "off_target": _off_target,
        "length": _length,
        "mix": _mix,
        "one_document": _one_document,
        "scarce": _scarce,
    }
    return [{"kind": kind, "text": text} for kind, check in checks.items() for text in check(audit)]


def summary(audit: dict[str, Any]) -> str:
    """One line: how much stays, and why the rest went."""
    whole, kept = (audit["totals"][name]["documents"] for name in ("in", "kept"))
    gone = {name: size["documents"] for name, size in audit["reasons"].items() if not Reason[name].kept}
    why = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in gone.items() if count)
    return f"kept {kept:,} of {_records(whole)}" + (f"; left out {why}" if why else "")


def named(domain: str) -> str:
    """A domain as people read it: records that could not be read have none."""
    return domain or "(no domain)"


def _malformed(audit: dict[str, Any]) -> Iterator[str]:
    found = audit["reasons"]["malformed"]["documents"]
    if found:
        yield f"{_records(found)} of {audit['totals']['in']['documents']:,} could not be read; see the examples."


def _unscored(audit: dict[str, Any]) -> Iterator[str]:
    competed = audit["totals"]["competed"]["documents"]
    found = competed - sum(domain["scored"] for domain in audit["domains"].values())
    if found > UNSCORED * competed:
        yield f"{_records(found)} of {competed:,} got no score ({found / competed:.1%})."


def _constant(audit: dict[str, Any]) -> Iterator[str]:
    found = [name for name, domain in audit["domains"].items() if domain["constant"] and domain["scored"] > 1]
    if found:
        yield f"All scores are the same, so a lot decided in {_list([named(name) for name in found])}."


def _off_target(audit: dict[str, Any]) -> Iterator[str]:
    unit, floor = audit["rules"]["unit"], audit["rules"]["select"]["floor"]
    found = []
    for name, domain in audit["domains"].items():
        kept, whole = domain["kept"][unit], domain["competed"][unit]
        one_document = 1 if unit == "documents" else domain["longest"]
        over = kept - domain["target"] * whole
        wanted_by_floor = over > 0 and domain["kept"]["documents"] <= floor
        if abs(over) > max(OFF_TARGET * whole, one_document) and not wanted_by_floor:
            found.append((abs(over), f"{named(name)} {kept / whole:.1%} for {domain['target']:.1%}"))
    if found:
        listed = _list([text for _, text in sorted(found, reverse=True)])
        yield f"What was kept of the {unit} is off the target: {listed}."


def _length(audit: dict[str, Any]) -> Iterator[str]:
    """Of what is scored, and of the whole record where that is another."""
    scored, whole = audit["length"], audit["whole_length"]
    yield from _length_of("length", scored)
    if any(whole[key] != scored[key] for key in whole):
        yield from _length_of("the length of prompt and answer", whole)


def _length_of(what: str, length: dict[str, Any]) -> Iterator[str]:
    inside = length["inside_buckets"]
    found = {"all records": length}
    if len(length["domains"]) > 1:
        found |= {named(name): domain for name, domain in length["domains"].items()}
    found = {name: value for name, value in found.items() if value["records"] >= _ENOUGH}
    alike = [f"{name} {value['overall']:+.2f}" for name, value in found.items() if _alike(value["overall"])]
    if alike:
        text = f"Score and {what} go together (rank correlation: {_list(alike)})"
        if inside is None:
            yield f"{text}, and length may be what was chosen: raise select.length_buckets."
        elif _alike(inside):
            yield f"{text}, even inside the length buckets ({inside:+.2f}): length was chosen, or what goes with it."
        else:
            yield f"{text}; records compete inside length buckets, where it is {inside:+.2f}."
    elif _alike(inside):
        yield f"Inside the length buckets score and {what} go together (rank correlation {inside:+.2f})."


def _mix(audit: dict[str, Any]) -> Iterator[str]:
    found = []
    for name, domain in audit["domains"].items():
        before, after = domain["share_before"], domain["share_after"]
        if before and after is not None and not before / SHIFT <= after <= before * SHIFT:
            text = f"{named(name)} {before:.1%} before, {after:.1%} after"
            found.append((-max(before, after), name, text))
    if found:
        listed = _list([text for *_, text in sorted(found)])
        yield f"Shares of the tokens changed by more than {SHIFT} times: {listed}. A blend by weights can undo it."


def _one_document(audit: dict[str, Any]) -> Iterator[str]:
    found = [named(name) for name, domain in audit["domains"].items() if domain["competed"]["documents"] == 1]
    if found:
        yield f"A single document competed, against nothing, in {_list(found)}."


def _scarce(audit: dict[str, Any]) -> Iterator[str]:
    """Sorscher et al. 2022: keeping the hard helps where data is abundant, and the easy where it is scarce."""
    parameters, tokens = audit["parameters"], audit["totals"]["competed"]["tokens"]
    if parameters and tokens < TOKENS_PER_PARAMETER * parameters:
        yield (
            f"There were {tokens / parameters:.2g} tokens per parameter to choose from. With fewer than about "
            f"{TOKENS_PER_PARAMETER}, leaving out the easy ones can hurt: keep more, or revive some."
        )


def _alike(correlation: float | None) -> bool:
    return correlation is not None and abs(correlation) > ALIKE


def _records(count: int) -> str:
    return f"{count:,} record{'' if count == 1 else 's'}"


def _list(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
