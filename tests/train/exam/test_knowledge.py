"""Multiple choice and lists: the reference answers in many forms, wrong ones, and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.errors import ConfigError
from train.exam.base import Outcome
from train.exam.facts import FACTS
from train.exam.knowledge import FactChoices, FactLists, MultipleChoice, ShortLists, list_items

CHOICES = [{"id": "a", "question": "Capital of France?", "choices": ["Rome", "Paris", "Élysée"], "answer": 1}]
LISTS = [
    {
        "question": "Name the islands.",
        "items": [["Trinidad and Tobago", "Trinidad"], "Cuba", "the Bahamas"],
        "optional": ["Haiti"],
    }
]


def written(path: Path, records: list[object]) -> str:
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in records))
    return str(path)


def test_every_form_of_a_choice_is_read(tmp_path):
    exam = MultipleChoice(written(tmp_path / "a.jsonl", CHOICES))
    (question,) = exam.questions()
    assert question.prompt == "Capital of France?\nA. Rome\nB. Paris\nC. Élysée\nAnswer:"
    for answer in (" B", "b", "(B)", "B.", "B. Paris", "B) Paris", "**B**", "Paris", "paris.", "The answer is B."):
        assert exam.judge(question, answer).outcome is Outcome.right, answer
    for answer in (
        "B. It is a city.",
        "B, I think",
        "B. Paris, a city",
        "B. Paris, or Paris",
        "b) paris. I am sure",
        "B, b",
    ):
        assert exam.judge(question, answer).outcome is Outcome.right, answer
    for answer in ("A", "(C)", "elysee", "Answer: A", "Rome"):
        assert exam.judge(question, answer).outcome is Outcome.wrong, answer
    for answer in ("", "D", "Berlin", "A country", "A) or (B)", "B. Rome", "A. Paris", "Bordeaux"):
        assert exam.judge(question, answer).outcome is Outcome.unreadable, answer
    for answer in (
        "B, A, C",
        "B, A",
        "b, a, c",
        "B. Paris A. Rome",
        "B. Paris, or A. Rome",
        "B. A.",
        "B: A",
        "B, A or C",
    ):
        assert exam.judge(question, answer).outcome is Outcome.unreadable, answer
    for answer in ("B. Paris, Rome", "B. Paris or Rome", "**B** **C**", "(B) (A)", "B. a", "B. Paris b) A)"):
        assert exam.judge(question, answer).outcome is Outcome.unreadable, answer


def test_a_letter_in_the_text_of_a_choice_is_no_choice(tmp_path):
    record = {"question": "Which?", "choices": ["vitamin C", "Washington D.C.", "3, 4 and B", "Who am I"], "answer": 0}
    exam = MultipleChoice(written(tmp_path / "a.jsonl", [record]))
    (question,) = exam.questions()
    for answer, outcome in (
        *(
            ("A. Vitamin C", "right"),
            ("A. vitamin C.", "right"),
            ("A, vitamin C, not sugar", "right"),
            ("A. 20 °C.", "right"),
        ),
        *(("B. Washington D.C.", "wrong"), ("C. 3, 4 and B", "wrong"), ("A. Washington D.C.", "unreadable")),
        *(
            ("A. Vitamin C, C", "unreadable"),
            ("A. Vitamin D.", "unreadable"),
            ("A. Vitamin C B. Washington", "unreadable"),
        ),
    ):
        assert exam.judge(question, answer).outcome.name == outcome, answer


def test_every_form_of_a_list_is_read(tmp_path):
    exam = ShortLists(written(tmp_path / "a.jsonl", LISTS))
    (question,) = exam.questions()
    for answer in (
        *("Cuba, the Bahamas, Trinidad and Tobago", "Trinidad, Cuba and Bahamas.", "- Bahamas\n- Trinidad\n- CUBA"),
        *("1. Cuba (the largest)\n2. Trinidad and Tobago\n3) Bahamas", "The islands are: Cuba, Bahamas, and Trinidad"),
        *("The islands are:\n* **Cuba**\n* Bahamas: small\n* Trinidad - south", "Haiti; Cuba; Bahamas & Trinidad"),
        *("1. Cuba 2. Trinidad and Tobago 3. Bahamas", "The islands are 1) Cuba, 2) Bahamas and 3) Trinidad."),
        *("Cuba, Trinidad or Trinidad and Tobago, Bahamas", "Cuba, Bahamas, Trinidad, or Trinidad and Tobago"),
        *("Cuba, cuba, Bahamas, Trinidad", "Cuba, Trinidad and Tobago, and the Bahamas"),
    ):
        found = exam.judge(question, answer)
        assert found.outcome is Outcome.right and found.figures == {"precision": 1, "recall": 1}, (answer, found)
    some = exam.judge(question, "Cuba, Iceland")
    assert (some.outcome, some.figures) == (Outcome.partly, {"precision": 1 / 2, "recall": 1 / 3})
    assert some.score == pytest.approx(0.4) and "missing: Trinidad and Tobago, the Bahamas" in some.note
    assert exam.judge(question, "Iceland, Rome").outcome is Outcome.wrong
    assert exam.judge(question, "Haiti").score == 0, "an optional item alone is wrong"
    assert exam.judge(question, " \n").outcome is Outcome.unreadable
    for answer in (
        "1. Cuba 3. Bahamas",
        "Cuba or Bahamas, Trinidad",
        "Cuba, or Bahamas, Trinidad",
        "Cubas, Bahamas, Trinidad",
    ):
        assert exam.judge(question, answer).score < 1, answer
    assert list_items("a, a thing and A; (b)") == ["a", "thing"]


def test_facts_are_right_and_other_facts_wrong():
    lists, choices = FactLists(), FactChoices(number=60)
    asked = lists.questions()
    for question, items in zip(asked, FACTS.values(), strict=True):
        for form in (", ".join, "\n- ".join, " and ".join):
            for spelling in (0, -1):
                answer = form([one.split("|")[spelling] for one in reversed(items)])
                assert lists.judge(question, answer).score == 1, answer
        other = next(one for one in FACTS.values() if not set(one) & set(items))
        assert lists.judge(question, ", ".join(other)).score == 0
        assert not any(item.split("|")[0] in question.prompt.split() for item in items), "no example gives it away"
    for question in choices.questions():
        texts, right = question.reference
        assert [choices.judge(question, "ABCD"[i]).score for i in range(4)] == [i == right for i in range(4)]
        assert [choices.judge(question, text).score for text in texts] == [i == right for i in range(4)]
    assert {one.reference[1] for one in choices.questions()} == {0, 1, 2, 3}


WRITTEN = {
    "planets of the Solar System": [
        "1. Mercury 2. Venus 3. Earth 4. Mars 5. Jupiter 6. Saturn 7. Uranus 8. Neptune",
        "The planets are: 1) Mercury, 2) Venus, 3) Earth, 4) Mars, 5) Jupiter, 6) Saturn, 7) Uranus and 8) Neptune",
    ],
    "five oceans": [
        "Atlantic, Pacific, Indian, Arctic and Southern oceans",
        "The Atlantic, Pacific, Indian, Arctic, and Southern or Antarctic Oceans.",
    ],
    "Great Lakes of North America": ["Lakes Superior, Michigan, Huron, Erie and Ontario"],
    "seasons of the year": [
        *("spring, summer, autumn or fall, winter", "Spring, summer, fall/autumn, and winter"),
        "spring, summer, autumn, or fall, and winter",
    ],
    "prime numbers below 10": ["1. 2 2. 3 3. 5 4. 7", "1) two 2) three 3) five 4) seven", "2, 3, 5, 7."],
    "kinds of chess pieces": ["kings, queens, rooks, bishops, knights, pawns"],
    "suits of French playing cards": ["heart, diamond, club, spade"],
    "cardinal directions": ["N, E, S, W"],
}
AMISS = {
    "planets of the Solar System": ["1. Mercury 2. Venus 3. Earth 4. Mar 5. Jupiter 6. Saturn 7. Uranus 8. Neptune"],
    "five oceans": [
        "Atlantic, Pacific, Indian, Arctic and Southern seas",
        "Atlantic, Pacific, Indian, Arctic or Southern",
    ],
    "seasons of the year": [
        "spring, summer or autumn, winter",
        "spring, summer/winter, fall",
        "spring, summer, winter or snow",
    ],
    "prime numbers below 10": ["1. 2 2. 3 3. 5 4. 9", "2. 3. 5. 7. 9.", "1, 2, 3, 5, 7"],
    "kinds of chess pieces": ["kings, queens, rooks, bishops, knights, horses"],
}


def test_lists_as_people_write_them():
    asked = dict(zip(FACTS, FactLists().questions(), strict=True))
    for title, answers in WRITTEN.items():
        for answer in answers:
            found = FactLists().judge(asked[title], answer)
            assert found.score == 1, (answer, found)
    for title, answers in AMISS.items():
        for answer in answers:
            assert FactLists().judge(asked[title], answer).score < 1, answer


GOOD = CHOICES[0]
BAD = {
    "damaged": ('{"question": ', "a.jsonl:2: is not JSON"),
    "no object": ("[]", "a.jsonl:2: it is not an object"),
    "no answer": ({"question": "q", "choices": ["x1", "y1"]}, "a.jsonl:2: it has no 'answer'"),
    "answer outside": ({**GOOD, "id": "b", "answer": 3}, "a.jsonl:2: needs from 2 to 26 choices"),
    "one choice": ({**GOOD, "id": "b", "choices": ["x1"]}, "a.jsonl:2: needs from 2 to 26 choices"),
    "same choices": ({**GOOD, "id": "b", "choices": ["the x1", "X1"]}, "a.jsonl:2: two choices are the same"),
    "a letter": ({**GOOD, "id": "b", "choices": ["B", "x1"]}, "a choice of one letter"),
    "same id": (GOOD, "a.jsonl:2: the id 'a' is also that of "),
    "empty": ({**GOOD, "id": "b", "question": " "}, "a question must have 1 to 20,000 characters"),
    "half a pair": ('{"question": "\\ud800", "choices": ["x1", "y1"], "answer": 0}', "question is not text"),
    "deep": ("[" * 100_000, "a.jsonl:2: is nested too deeply"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_cannot_be_used_is_one_line(tmp_path, name):
    line, reason = BAD[name]
    with pytest.raises(ConfigError) as caught:
        MultipleChoice(written(tmp_path / "a.jsonl", [GOOD, line]))
    assert reason in str(caught.value) and "\n" not in str(caught.value) and caught.value.key == "path"
    MultipleChoice(written(tmp_path / "a.jsonl", [GOOD]))


def test_a_list_or_file_that_cannot_be_used_is_one_line(tmp_path):
    for items in ([], [""], [[]], ["a", "The A"], [["a", "b"], "b"]):
        with pytest.raises(ConfigError, match=r"a\.jsonl:1: "):
            ShortLists(written(tmp_path / "a.jsonl", [{"question": "q", "items": items}]))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    for path in ("empty.jsonl", "binary.jsonl", "nothing.jsonl", "."):
        with pytest.raises(ConfigError):
            ShortLists(str(tmp_path / path))
    with pytest.raises(ConfigError, match="name a jsonl file"):
        ShortLists()
