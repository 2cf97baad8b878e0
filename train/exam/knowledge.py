"""Examine knowledge: multiple choice and short lists, from jsonl files and from lists of our own."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from string import ascii_uppercase
from typing import Any, ClassVar

from core.errors import ConfigError, check_numbers
from data.images.generated.draws import Draws
from train.exam.base import Outcome, Question, Verdict
from train.exam.config import Generated
from train.exam.facts import FACTS
from train.exam.question_files import read_dataset, read_jsonl

LONGEST_PROMPT, MOST_ITEMS = 20_000, 1000
_CHOICE_SHAPE = {"question": str, "choices": [str], "answer": (int, str), "labels?": [str], "id?": str}
_LIST_SHAPE = {"question": str, "items": [(str, [str])], "optional?": [(str, [str])], "id?": str}

_ANSWER_IS = re.compile(
    r"\A.*\b(?:answer|option|choice|letter)\s*(?:(?:is|would be|should be)\b|[:=])\s*:?", re.IGNORECASE | re.DOTALL
)
_LEAD_IN = re.compile(
    r"\A\s*(?:i (?:think|believe|guess)\s+)?(?:(?:it|that)(?: is|['\N{RIGHT SINGLE QUOTATION MARK}]s)\s+)?"
    r"(?:i(?:['\N{RIGHT SINGLE QUOTATION MARK}]d| would)? (?:choose|pick|say)\s+)?"
    r"(?:the )?(?:(?:correct|right) )?(?:(?:option|choice|letter|answer)\s+(?=\W*[a-z]\b))?",
    re.IGNORECASE,
)
_AROUND = " \t\r\n\"'_#\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"
_LETTER = re.compile(r"[(\[]*([A-Za-z])(?:[)\].:,!]+(?:\s|\Z)|\s+[-\N{EN DASH}\N{EM DASH}]\s|\Z)")
"""The letter of a choice with a sign after it, or alone."""
_UNCLEAR = re.compile(r"\b(?:not|no|never|neither|nor|cannot|except|unlike|wrong|incorrect|false|or|either|t)\b")
"""Words that make a sentence no clear choice; "t" is that of "isn't"."""
_IS_RIGHT = re.compile(r"\s+is (?:the )?(?:correct|right|best)\b", re.IGNORECASE)
_BULLET = re.compile(r"\A\s*(?:[-+•·]\s*|\*(?!\*)\s*|\**\(?\d+[.)]\**\s+)")
_INTRODUCTION = re.compile(r"\A\s*#|\b(?:here|are|is|include|following|below)\b|[:!]\W*\Z", re.IGNORECASE)
_POLITE = re.compile(r"\A\s*(?:sure|certainly|of course|okay|ok)\b[\s,.!:]+(?=\S)", re.IGNORECASE)
_REMARK = re.compile(r"\((?!\d+\))(?:[^()]|\([^()]*\))*\)")
"""What follows in parentheses, which may have others in them. "(1)" is a number of a list."""

Items = tuple[tuple[str, ...], ...]
"""The spellings of each item; the first is the one to show."""


@dataclass(frozen=True)
class ListReference:
    """What a list must have, and what it may have."""

    items: Items
    optional: Items = ()


@dataclass(frozen=True)
class QuestionFile:
    """Options of the examinations whose questions are in a file or in a data set."""

    path: str = ""
    """The jsonl file."""
    number: int | None = None
    """Ask only the first questions; null: all."""
    dataset: str = ""
    """Instead of a file: a data set on the Hugging Face hub, or the folder of one."""
    subset: str | None = None
    """Configuration of the data set, if it has several."""
    split: str = "test"
    columns: dict[str, Any] = field(default_factory=dict)
    """Columns of the data set that have other names than the keys of a question: {question: stem, answer: answerKey}.
    A dot leads into a column with parts (choices.text), and a list of columns makes a list ([sol1, sol2]).
    """

    def __post_init__(self) -> None:
        check_numbers(self, positive=("number",))
        if self.dataset and self.path:
            raise ConfigError("dataset", self.dataset, "cannot be combined with path; drop one")
        if not self.dataset and (self.columns or self.subset is not None):
            raise ConfigError(
                "columns" if self.columns else "subset", None, "applies to a data set: name it in dataset"
            )
        self.questions()

    def questions(self) -> Sequence[Question]:
        return self._questions

    @cached_property
    def _questions(self) -> list[Question]:
        raise NotImplementedError

    def _records(self, shape: Any) -> list[tuple[str, dict[str, Any]]]:
        """Return the place and the record of each question. Raises `ConfigError` for one that does not fit."""
        if self.dataset:
            records = read_dataset(self.dataset, self.subset, self.split, self.columns, shape, self.number)
        else:
            records = read_jsonl(self.path, shape)
        for where, record in records:
            if not record["question"].strip() or len(record["question"]) > LONGEST_PROMPT:
                raise self._refused(where, f"a question must have 1 to {LONGEST_PROMPT:,} characters")
        return records[: self.number]

    def _refused(self, where: str, reason: str) -> ConfigError:
        return ConfigError("dataset" if self.dataset else "path", self.dataset or None, f"{where}: {reason}")


@dataclass(frozen=True)
class MultipleChoice(QuestionFile):
    """Questions with lettered choices, from a jsonl file or a data set whose records have `question`, `choices`,
    `answer` and perhaps `labels` of the choices and `id`. `answer` is the place of the right choice, from 0, or its
    label, or its letter.

    Right is an answer that begins with the letter ("B", "(b)", "B. Paris", "B - Paris", "B Paris", "B is correct"),
    perhaps after words such as "Answer:", "The answer is", "Option" or "It is", or in LaTeX or bold; one that is the
    text of the choice; or a sentence that has the text of this choice alone ("It must be Paris."), without a negation
    or "or". An answer with another letter or choice is wrong. Any other is unreadable, also one that names another
    choice too ("A, B", "A. Rome B. Paris", "B. Rome").
    """

    name: ClassVar[str] = "multiple_choice"
    version: ClassVar[int] = 3

    @cached_property
    def _questions(self) -> list[Question]:
        found = []
        for where, record in self._records(_CHOICE_SHAPE):
            choices, right = record["choices"], _right_place(record)
            if not 2 <= len(choices) <= len(ascii_uppercase) or right is None or not 0 <= right < len(choices):
                reason = (
                    "needs from 2 to 26 choices, and an answer from 0 to their number less one, or a label or letter"
                )
                raise self._refused(where, reason)
            if len(set(map(normalised, choices))) < len(choices):
                raise self._refused(where, "two choices are the same")
            if any(len(one) == 1 and one.isalpha() for one in map(normalised, choices)):
                raise self._refused(where, "a choice of one letter would be read as a choice's letter")
            found.append(choice_question(record["id"], record["question"], choices, right))
        return found

    def judge(self, question: Question, answer: str) -> Verdict:
        return judge_choice(question, answer)


@dataclass(frozen=True)
class ShortLists(QuestionFile):
    """Questions whose answer is a complete list, from a jsonl file or a data set whose records have `question`, `items`
    and perhaps `optional` (which may be there or not) and `id`. An item is a text, or a list of its spellings.

    Items are separated by line breaks or numbers ("1. Cuba 2. Haiti"), or else by commas, semicolons and "and".
    Words before the list ("Here are two:"), bullets, numbers, articles, case, accents and what follows in parentheses
    or after a dash are ignored. Two spellings
    of an item are one item ("autumn or fall"). The first or last word of an item may be plural ("Southern oceans"). A
    list is right if it has all items and nothing else, in any order; any other scores the harmonic mean (F1) of the
    figures `precision` and `recall`.
    """

    name: ClassVar[str] = "short_lists"
    version: ClassVar[int] = 3

    @cached_property
    def _questions(self) -> list[Question]:
        found = []
        for where, record in self._records(_LIST_SHAPE):
            items, optional = (
                tuple((one,) if isinstance(one, str) else tuple(one) for one in record.get(key, ()))
                for key in ("items", "optional")
            )
            spellings = [text for one in (*items, *optional) for text in set(map(normalised, one))]
            if not items or "" in spellings or not all((*items, *optional)) or len(spellings) > MOST_ITEMS:
                raise self._refused(where, f"needs 1 to {MOST_ITEMS} items, none of them empty")
            if len(set(spellings)) < len(spellings):
                raise self._refused(where, "two items have the same spelling")
            found.append(list_question(record["id"], record["question"], ListReference(items, optional)))
        return found

    def judge(self, question: Question, answer: str) -> Verdict:
        return judge_list(question.reference, answer)


@dataclass(frozen=True)
class FactLists:
    """Complete lists of common knowledge, such as the planets of the Solar System. Judged as `ShortLists`."""

    number: int = len(FACTS)
    """Questions; the others are solved examples."""
    shots: int = 1
    """Solved examples before each question, which are other lists."""

    name: ClassVar[str] = "fact_lists"
    version: ClassVar[int] = 3

    def __post_init__(self) -> None:
        check_numbers(self, positive=("number",), not_negative=("shots",))
        for key, most in (("number", len(FACTS)), ("shots", len(FACTS) - 1)):
            if getattr(self, key) > most:
                raise ConfigError(key, getattr(self, key), f"must be at most {most}")

    def questions(self) -> Sequence[Question]:
        titles = list(FACTS)
        found = []
        for place, title in enumerate(titles[: self.number]):
            others = [titles[(place + 1 + i) % len(titles)] for i in range(self.shots)]
            before = "".join(f"{_ask_list(one)}\nAnswer: {', '.join(_items(one, 0))}\n\n" for one in others)
            items = tuple(tuple(text.split("|")) for text in FACTS[title])
            found.append(list_question(title.replace(" ", "-"), _ask_list(title), ListReference(items), before))
        return found

    def judge(self, question: Question, answer: str) -> Verdict:
        return judge_list(question.reference, answer)


@dataclass(frozen=True)
class FactChoices(Generated):
    """Which of four things belongs to a list of common knowledge? Judged as `MultipleChoice`."""

    number: int = 40
    shots: int = 2

    name: ClassVar[str] = "fact_choices"
    version: ClassVar[int] = 3

    def questions(self) -> Sequence[Question]:
        worked = [self._choice("worked", place) for place in range(self.shots)]
        before = "".join(
            f"{_lettered(text, choices)}\nAnswer: {ascii_uppercase[right]}\n\n" for text, choices, right in worked
        )
        asked = [self._choice("asked", place) for place in range(self.number)]
        return [choice_question(f"{self.name}-{place}", *one, before) for place, one in enumerate(asked)]

    def judge(self, question: Question, answer: str) -> Verdict:
        return judge_choice(question, answer)

    def _choice(self, what: str, place: int) -> tuple[str, list[str], int]:
        draws = Draws("fact", what, self.seed, place)
        titles = list(FACTS)
        title = titles.pop(draws.below(len(titles)))
        chosen = []
        for _ in range(3):
            items = _items(titles.pop(draws.below(len(titles))), 0)
            chosen.append(items[draws.below(len(items))])
        items, right = _items(title, 0), draws.below(4)
        chosen.insert(right, items[draws.below(len(items))])
        return f"Which of these is one of the {title}?", chosen, right


def _ask_list(title: str) -> str:
    return f"List the {title}."


def _items(title: str, spelling: int) -> list[str]:
    return [text.split("|")[spelling] for text in FACTS[title]]


def _right_place(record: Mapping[str, Any]) -> int | None:
    """Return the place of the right choice, or None if `answer` names none. "3" is a place unless labels are given."""
    answer, labels = record["answer"], record.get("labels")
    if labels is not None:
        return labels.index(str(answer)) if str(answer) in labels else None
    if isinstance(answer, int):
        return answer
    if answer.isdecimal() and len(answer) < 3:
        return int(answer)
    return ascii_uppercase.index(answer) if len(answer) == 1 and answer in ascii_uppercase else None


def choice_question(name: str, text: str, choices: Sequence[str], right: int, before: str = "") -> Question:
    """`right`: the place of the right choice. `before`: solved examples."""
    prompt = f"{before}{_lettered(text, choices)}\nAnswer:"
    return Question(name, prompt, (tuple(choices), right), max_tokens=24, stops=("\n",), own_text=text)


def list_question(name: str, text: str, reference: ListReference, before: str = "") -> Question:
    limit = 16 + 8 * len(reference.items)
    return Question(name, f"{before}{text}\nAnswer:", reference, max_tokens=limit, own_text=text)


def _lettered(text: str, choices: Sequence[str]) -> str:
    return "\n".join([text, *(f"{letter}. {one}" for letter, one in zip(ascii_uppercase, choices, strict=False))])


def judge_choice(question: Question, answer: str) -> Verdict:
    """Judge an answer to a `choice_question`."""
    choices, right = question.reference
    chosen = _chosen(_plain(answer), [_plain(one) for one in choices])
    if isinstance(chosen, str):
        return Verdict(Outcome.unreadable, 0, chosen)
    is_right = chosen == right
    return Verdict(Outcome.right, 1) if is_right else Verdict(Outcome.wrong, 0, f"chose {ascii_uppercase[chosen]}")


def _plain(text: str) -> str:
    """Return a text without the signs of LaTeX and of emphasis: "$\\boxed{\\text{B}}$" and "**B**" are "B"."""
    plain = text.strip()
    for _ in range(2):
        plain = re.sub(r"\\(?:boxed|text|textbf|mathbf|mathrm)\{([^{}]*)\}", r"\1", plain)
    return re.sub(r"(?<!\w)\*+|\*+(?!\w)|[$\\`]", "", plain).strip() or text.strip()


def _chosen(answer: str, choices: Sequence[str]) -> int | str:
    """Return the place of the choice that an answer names, or why it cannot be read."""
    said = _LEAD_IN.sub("", _ANSWER_IS.sub("", answer)).strip(_AROUND)
    for place, one in enumerate(choices):
        if _words(one) == _words(said) != "":
            return place
    letter = _LETTER.match(said) or re.match(r"[A-Za-z](?=\s)", said)
    if letter:
        place, rest = ascii_uppercase.index(letter[0].strip("([")[0].upper()), said[letter.end() :]
        is_choice = place < len(choices)
        if _LETTER.match(said) or (is_choice and _IS_RIGHT.match(rest)):
            if not is_choice:
                return "names no choice"
            return "names several choices" if _other_choices(rest, choices, place) else place
    found = next((i for i, one in enumerate(choices) if normalised(one) == normalised(said)), _named(said, choices))
    if found is None:
        return "names no choice"
    labels = re.findall(r"\A[A-Z](?=\s)|\(([A-Z])\)\W*\Z", said)
    others = {ascii_uppercase.find(one or said[0]) for one in labels} - {found}
    return "names several choices" if any(place < len(choices) for place in others) else found


def _named(sentence: str, choices: Sequence[str]) -> int | None:
    """Return the only choice whose text is in a sentence, as whole words, or None. A negation or "or" elsewhere in the
    sentence makes it unclear.
    """
    rest, found = f" {_words(sentence)} ", []
    for text, place in sorted(((_words(one), i) for i, one in enumerate(choices)), key=lambda one: -len(one[0])):
        if text and f" {text} " in rest:
            rest = rest.replace(f" {text} ", " | ")  # so that "York" is not found in "New York"
            found.append(place)
    if len(found) != 1 or _UNCLEAR.search(rest) or _other_choices(sentence, choices, found[0]):
        return None
    return found[0]


def _other_choices(rest: str, choices: Sequence[str], chosen: int) -> set[int]:
    """Return the other choices that `rest`, what follows the letter of a choice, names by their letter or text.

    A letter is one before a parenthesis, a sign, its choice or the end, or alone between commas. That leaves out the
    words "a" and "I", and the letters in the text of the chosen choice.
    """
    rest = re.sub(rf"(?<!\w){re.escape(choices[chosen])}(?!\w)", " ", rest, flags=re.IGNORECASE)
    parts = [rest, *re.split(r"[,;/\n]|\b(?:and|or)\b", rest)]
    texts = set(map(normalised, parts))
    letters = re.findall(r"(?<![^\s(\[*,;/])([a-z])(?:[)\]]|[.:,;*]+(?!\w)|\s*\Z)", rest, re.IGNORECASE)
    said = {ascii_uppercase.find(one.upper()) for one in (*letters, *(part.strip() for part in parts)) if len(one) == 1}
    return {
        place
        for place, one in enumerate(choices)
        if place != chosen
        and (
            place in said
            or (normalised(one) or one) in texts
            or re.search(rf"(?<!\w){ascii_uppercase[place]}\W{{1,4}}{re.escape(one)}(?!\w)", rest, re.IGNORECASE)
        )
    }


def judge_list(reference: ListReference, answer: str) -> Verdict:
    """Judge a list of items by its precision and recall."""
    every = (*reference.items, *reference.optional)
    known = {normalised(text): i for i, one in enumerate(every) for text in one}
    place = {text: i for text, i in known.items() if i < len(reference.items)}
    allowed = known.keys() - place.keys()
    found = list_items(answer, known)
    if not found:
        return Verdict(Outcome.unreadable, 0, "lists nothing", {"precision": 0, "recall": 0})
    hits = {place[one] for one in found if one in place}
    strangers = [one for one in found if one not in place and one not in allowed]
    precision = len(hits) / (len(hits) + len(strangers)) if hits or strangers else 0.0
    recall = len(hits) / len(reference.items)
    score = 2 * precision * recall / (precision + recall) if hits else 0.0
    figures = {"precision": precision, "recall": recall}
    if score == 1:
        return Verdict(Outcome.right, 1, "", figures)
    missing = [one[0] for i, one in enumerate(reference.items) if i not in hits]
    note = f"missing: {', '.join(missing)}; not on the list: {', '.join(strangers)}"[:500]
    return Verdict(Outcome.partly if hits else Outcome.wrong, score, note, figures)


def list_items(text: str, known: Mapping[str, int] | None = None) -> list[str]:
    """Split an answer into normalised items, each once. `known`: the item of each spelling; a part that is one as a
    whole is not split further.
    """
    known = known or {}
    text = re.sub(r"\A\s*\(([^()]*)\)\s*\Z", r"\1", text)
    lines = [line for line in _numbers_on_lines(_REMARK.sub(" ", text).strip()).splitlines() if line.strip()]
    bulleted = [_BULLET.sub("", line) for line in lines[_introduction(lines, known) :]]
    parts: list[str] = []
    for line in bulleted:
        if len(bulleted) > 1:
            line = re.split(r":|\s[-\N{EN DASH}\N{EM DASH}]\s", line, maxsplit=1)[0]  # "Mercury: the smallest"
        else:
            line = _without_introduction(line, known)
        parts += [line] if normalised(line) in known else re.split(r"[,;](?!\s*or\s)", line)
    found: dict[str, None] = {}
    for part in parts:
        name = part.partition(":")[0]  # "Mercury: the smallest, Venus"
        whole = re.sub(r"\A\s*(?:and|&)\s+", "", name if normalised(name) in known else part)
        for one in [whole] if _known_spelling(whole, known) in known else re.split(r"\s(?:and|&)\s", whole):
            if name := _known_spelling(one, known):
                found[name] = None
    return list(found)


def _introduction(lines: Sequence[str], known: Mapping[str, int]) -> int:
    """Return how many lines come before the list: "The planets are:", or sentences before bullets or numbers."""
    bullets = [bool(_BULLET.match(line)) for line in lines]
    before = bullets.index(True) if any(bullets) and all(bullets[bullets.index(True) :]) else 0
    if before and all(normalised(line) not in known and _INTRODUCTION.search(line) for line in lines[:before]):
        return before
    opens = len(lines) > 1 and normalised(lines[0]) not in known
    return 1 if opens and re.search(r"(?::|\b(?:are|is))\W*\Z", lines[0]) else 0


def _without_introduction(line: str, known: Mapping[str, int]) -> str:
    """Return a list on one line without the words before it: "Here are two: Cuba, Haiti" is "Cuba, Haiti"."""
    line = _POLITE.sub("", line)
    while (found := re.match(r"([^,;:]*):\s*(?=\S)", line)) and normalised(found[1]) not in known:
        line = line[found.end() :]
    return line if normalised(line) in known else re.sub(r"\A[^,;:]*?\b(?:are|is|include)\s+(?=\S)", "", line)


def _numbers_on_lines(text: str) -> str:
    """Break the line before each of the numbers "1." "2." ... or "1)" "2)" ..., if these are all such numbers."""
    pattern = re.compile(r"(?<!\S)\(?(\d{1,4})[.)]\s")
    numbers = [int(one) for one in pattern.findall(text)]
    is_numbered = len(numbers) > 1 and numbers == list(range(1, len(numbers) + 1))
    return pattern.sub(r"\n\g<0>", text) if is_numbered else text


def _known_spelling(text: str, known: Mapping[str, int]) -> str:
    """Return the normalised text, or the known spelling that it stands for: "autumn or fall" is one item, and "Southern
    oceans" is the Southern Ocean. A single word has no plural, which would make "Mar" Mars.
    """
    name = normalised(text)
    if name in known:
        return name
    parts = re.split(r"/|\bor\b", text)
    either = [_known_spelling(one, known) for one in parts] if len(parts) > 1 else [name]
    if len(either) > 1 and len({known.get(one) for one in either}) == 1 and either[0] in known:
        return either[0]
    first, *middle, last = name.split() if " " in name else ("", "")
    singular = [" ".join([first.removesuffix("s"), *middle, last]), " ".join([first, *middle, last.removesuffix("s")])]
    return next((one for one in singular if one in known), name)


def _words(text: str) -> str:
    """Return the words of a text without case, accents and punctuation."""
    letters = [one for one in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(one)]
    return " ".join("".join(one if one.isalnum() else " " for one in letters).split())


def normalised(text: str) -> str:
    """Return a text without case, accents, articles, punctuation, parentheses and what follows a dash with spaces."""
    text = re.sub(r"\([^()]*\)|\s[-\N{EN DASH}\N{EM DASH}]\s.*", " ", text, flags=re.DOTALL)
    words = _words(text).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)
