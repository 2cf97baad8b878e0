"""Choices and lists as instructed models write them. Controls switch off one rule of the reader each."""

from __future__ import annotations

import re
from typing import Any

import pytest

from train.exam import knowledge
from train.exam.base import Outcome
from train.exam.knowledge import ListReference, choice_question, judge_choice, judge_list

CAPITAL = choice_question("fr", "What is the capital of France?", ["Rome", "Paris", "Bern"], 1)
PLANETS = ListReference((("Mercury",), ("Venus",)))
RIGHT = (
    *("B Paris", "B - Paris", "b \N{EN DASH} paris", "B is correct.", "B Paris is the capital", "**B**", "`B`", "[B]"),
    *("Option B", "Choice B", "Option (B)", "Option B: Paris", "I choose option B.", "The correct option is B."),
    *("It is B.", "It's B", "That's B", "I think it is B.", "I'd say B", "The letter is B", "The answer would be B"),
    *("The capital of France is Paris.", "It's Paris!", "Correct answer: **Paris**", "Paris (B)", "B) **Paris**"),
    *("Answer: B)", "**Answer:** B", "The correct answer is **(B) Paris**.", "The answer is option B", "Answer = B"),
    *("$\\boxed{B}$", "\\(\\boxed{\\text{B}}\\)", "The correct answer is:\n\nB. Paris", "Sure! The answer is B."),
    *("#### B", "B!", "'B'", '"B"', "_B_", "B\n\nParis is the capital.", "My final answer is $\\boxed{\\textbf{(B)}}$"),
    *("The capital is Paris, so the answer is **B**.", "The correct answer is B) Paris, because it is the capital."),
    *("Answer: The capital of France is Paris.", "I believe the correct answer is option **B**: Paris", "B, Paris"),
)
WRONG = (
    "A Rome",
    "A - Rome",
    "A is correct",
    "Option A",
    "It is Rome.",
    "The capital is Rome.",
    "$\\boxed{A}$",
    "**C**",
)
UNREADABLE = (
    *("A, B", "A. Rome B. Paris", "A Rome B Paris", "B - Paris, A - Rome", "B / C", "B and C", "Both A and B"),
    *("A or B", "It is A or B.", "Option A or B", "Option A and option B", "The answer is B or C", "$\\boxed{A, B}$"),
    *(
        "not A",
        "Not Paris",
        "The answer is not B",
        "The answer is not Paris",
        "It isn't Paris",
        "B is wrong",
        "Neither",
    ),
    *("B Rome", "A Paris", "Paris (A)", "The capital is Paris (A)", "Paris and Rome", "Paris or Berlin", "Option D"),
    *("D. Paris", "Parisian", "B-52", "A country", "The answer isn't A, it's B"),
    *("A. Paris is wrong; B. Paris", "Option C is wrong, B is right", "", "#"),
)
COMPLETE = (
    *("Mercury (the first), Venus (hot, bright)", "Mercury (hot (very), small), Venus", "(1) Mercury (2) Venus"),
    *("(Mercury, Venus)", "Here are the planets: Mercury, Venus", "The planets are as follows: Mercury, Venus"),
    *("There are two: Mercury and Venus", "There are two planets. They are: Mercury, Venus", "Answer: Mercury, Venus"),
    *("Sure! Here are the planets: Mercury, Venus", "Of course: Mercury, Venus", "Mercury: small, Venus"),
    *("Sure! Here are the planets of the Solar System.\n- Mercury\n- Venus", "## Planets\n- Mercury\n- Venus"),
    *(
        "Certainly!\n\nThe planets are:\n\n- Mercury\n- Venus",
        "Here are two planets.\n\n1. **Mercury** (hot)\n2. Venus",
    ),
    *("1. **Mercury** - the smallest, near\n2. **Venus** - hot, bright", "**1. Mercury**\n**2. Venus**"),
    *(
        "* **Mercury**: small, hot\n* **Venus**: hot",
        "+ Mercury\n+ Venus",
        "Mercury\n- Venus",
        "**Mercury**, **Venus**",
    ),
    *("The two planets are:\nMercury, Venus", "Here is the list:\nMercury\nVenus"),
)
AMISS = (
    *("Pluto\n- Mercury\n- Venus", "Pluto, Ceres: Mercury, Venus", "Mercury, Venus, Earth", "Mercury (Venus)"),
    *(
        "Mercury, Pluto (Venus, hot)",
        "- Mercury\n- Here\n- Venus",
        "Here are Mercury, Venus\n- Pluto",
        "Mercury: Venus",
    ),
    *("Mercury (the first, Venus", "- Here are the planets\n- Mercury\n- Venus"),
)


def misread() -> list[str]:
    """Return the answers that are not judged as they should be."""
    choices = ((RIGHT, Outcome.right), (WRONG, Outcome.wrong), (UNREADABLE, Outcome.unreadable))
    found = [one for texts, outcome in choices for one in texts if judge_choice(CAPITAL, one).outcome is not outcome]
    lists = ((COMPLETE, True), (AMISS, False))
    return found + [one for texts, right in lists for one in texts if (judge_list(PLANETS, one).score == 1) != right]


def test_answers_as_models_write_them():
    assert misread() == []


NEVER = re.compile(r"(?!)")
RULES: dict[str, tuple[str, Any, str]] = {
    "parentheses": ("_REMARK", NEVER, "Mercury (the first), Venus (hot, bright)"),
    "words before a list": ("_without_introduction", lambda line, known: line, "There are two: Mercury and Venus"),
    "a line before bullets": ("_INTRODUCTION", NEVER, "## Planets\n- Mercury\n- Venus"),
    "words before a letter": ("_LEAD_IN", NEVER, "Option B"),
    "a letter that is correct": ("_IS_RIGHT", NEVER, "B is correct."),
    "every line introduces": ("_INTRODUCTION", re.compile(""), "Pluto\n- Mercury\n- Venus"),
    "sentences": ("_named", lambda sentence, choices: None, "The capital of France is Paris."),
    "negations": ("_UNCLEAR", NEVER, "The answer is not Paris"),
    "other choices": ("_other_choices", lambda rest, choices, chosen: set(), "A. Rome B. Paris"),
    "emphasis": ("_plain", str.strip, "$\\boxed{B}$"),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_of_the_reader_is_needed(name, monkeypatch):
    rule, instead, example = RULES[name]
    monkeypatch.setattr(knowledge, rule, instead)
    assert example in misread()


def test_a_choice_inside_another_is_no_second_choice():
    question = choice_question("ny", "Which?", ["York", "New York", "a dog", "A cat"], 1)
    for answer, outcome in (("It is New York.", "right"), ("It is York.", "wrong"), ("A cat", "wrong")):
        assert judge_choice(question, answer).outcome.name == outcome, answer
    assert judge_choice(question, "New York, not York").outcome.name == "unreadable"
