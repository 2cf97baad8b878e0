"""Mathematical answers: every accepted form is right, wrong ones score 0, and what says two things is unreadable."""

from __future__ import annotations

import contextlib
import re
from fractions import Fraction

import pytest

from train.exam import answers_text, mathematics
from train.exam.answers_text import Claim, RootsAnswer, Scanner, UnreadableAnswer, read_number, read_roots, read_system
from train.exam.base import Outcome, Question
from train.exam.linear import LinearExpression, LinearSystem, signed_sum
from train.exam.mathematics import LinearSystems, Quadratics, WordProblems, solution_text


def system(*rows: tuple[int, ...]) -> LinearSystem:
    names = ("x", "y", "z")[: len(rows[0]) - 1]
    return LinearSystem(names, tuple(tuple(map(Fraction, row)) for row in rows))


ONE = system((1, 3, 1), (1, -3, 3))  # x = 2, y = -1/3
NONE = system((1, 1, 1), (2, 2, 3))
MANY = system((1, 1, 1), (2, 2, 2))  # (1 - t, t)
LINE = system((1, 1, 1, 3), (1, -1, 1, 1), (2, 0, 2, 4))  # y = 1, x + z = 2
PLANE = system((1, 1, 1, 3), (2, 2, 2, 6), (-1, -1, -1, -3))
RIGHT = {
    ONE: [
        *("x = 2, y = -1/3", " x=2 and y=-1/3.", "y = -1/3; x = 2", "(2, -1/3)", "(x, y) = (2, -1/3)", "{(2, -1/3)}"),
        *("x = 4/2 = 2\ny = (1 - 2)/3", "Adding, 2x = 4, so x = 2, then y = -1/3", "[2, -2/6]", "X = 2.0, Y = -1/3"),
        *("y = 7? No. The answer is x = 2, y = -1/3", r"\boxed{(2, -\frac{1}{3})}", r"$x = 2$, $y = -\frac{1}{3}$"),
        *(
            r"$x = 2 \text{ and } y = -1/3$",
            r"x = 2 \quad y = -1/3",
            "x = 2 y = -1/3",
            r"x = 2, \qquad y = \tfrac{-1}{3}",
        ),
        *(
            r"\begin{aligned} x &= 2 \\ y &= -1/3 \end{aligned}",
            "- x = 2, y = -1/3",
            "1) x = 2, y = -1/3",
            "- (2, -1/3)",
        ),
        *(
            "P(2, -1/3)",
            "P = (2, -1/3)",
            "S = {(2, -1/3)}",
            "x=2; y=-1/3",
            "(x,y)=(2,-1/3)",
            "The lines meet in P_1 (2, -1/3).",
        ),
        *(r"$\boxed{(2,-1/3)}$", r"$P\left(2, -\frac{1}{3}\right)$", r"\mathbb{L} = \{(2, -1/3)\}", "Point A(2, -1/3)"),
        *("x=2,y=-1/3", "A (2, -1/3) is on both lines, so S(2, -1/3)", "x=2,3y=-1, y=-1/3"),
        *("- x = 2\n- y = \N{MINUS SIGN}1/3", "the unique solution is x = 2 (checked) and y = -1/3"),
    ],
    NONE: [
        *("no solution", "No solutions.", "The system is inconsistent.", "it has no solution", "∅", "None."),
        *("it does not have real solutions", "doesn't have any solutions", r"\text{no solution}"),
        *("it does not have a solution", "there are no real solutions", "Answer: no solution", r"$\emptyset$"),
    ],
    MANY: [
        *("infinitely many solutions: x = 1 - t, y = t", "x = 1 - s, y = s", "{(1-s, s)}", "y = 1 - x", "x = 1 - y"),
        *("(x, y) = (1, 0) + t(-1, 1)", "(3, -2) - 2k*(-1, 1)", "y = t, x = 1 - y", "x = 2t, y = 1 - 2t, t real"),
        *(
            "{(x, y) : x = 1 - λ, y = λ, λ ∈ \N{DOUBLE-STRUCK CAPITAL R}}",
            "infinite solutions: (t_1, 1 - t_1)",
            "x = (2 - 3c)/2; y = 3c/2",
        ),
        *("(1, 0) + T(-1, 1)", "T(-1, 1) + (1, 0)", "(1, 0) - T (1, -1), T \N{ELEMENT OF} R"),
        *("not unique: infinitely many, y is free and x = 1 - y", "x = 1 - (a + b), y = a + b"),
        *(
            "(1,0)+(-1,1)t",
            "(1, 0) + (-1, 1) t where t is real",
            "t(-1,1)+(1,0)",
            "-2t*(1, -1) + (1, 0)",
            "t = y, x = 1 - t",
        ),
        *("t = y/2, x = 1 - 2t", "x = 1 - t, y = t, where t = y", "x = 1 - y, y ∈ R", "x = 1 - t, y = t (t ∈ R)"),
        *(r"x = 1 - t, y = t (t \in \mathbb{R})", "x = 1 - t, y = t (t real)", "x = 1 - t, y = t (t a real number)"),
        *("infinitely many: (t, 1 - t), that is x = s and y = 1 - s", "x = 1 - t where t is any number, y = t"),
    ],
    LINE: ["x = 2 - t, y = 1, z = t", "(s, 1, 2 - s)", "x = 2 - z, y = 1", "(1, 1, 1) + t(1, 0, -1)"],
    PLANE: ["x = 3 - y - z", "(3 - s - t, s, t)", "(3, 0, 0) + a(-1, 1, 0) + b(-1, 0, 1)", "z = 3 - x - y"],
}
WRONG = {
    ONE: [
        *("x = 2, y = -0.33", "(-1/3, 2)", "no solution", "infinitely many", "x = 2", "x = 2, y = t", "(2, 1/3)"),
        *("P(-1/3, 2)", "P(2, -1/3) or Q(1, 1)", "p(2, -1/3)", "P(2, 1/3)", "S = {(2, 1)}"),
        *(r"x = 2 \quad y = 1/3", "x = 2 y = 3", "x = 2y = -1/3", "-(2, -1/3)", "(2, -1/3)t", "t(2, -1/3)"),
    ],
    NONE: ["x = 1, y = 0", "x = 1 - t, y = t", "infinitely many solutions"],
    MANY: [
        *("x = 1, y = 0", "x = s, y = t", "x = t - t + 1, y = 0 t", "infinitely many: x = 0, y = 1"),  # dimension
        *("x = 2 - t, y = t", "{(1/2 - s, s)}", "(1, 1) + t(-1, 1)", "y = 2 - x", "x = -y"),  # point
        *("x = 1 + t, y = t", "{(1 - s, 2s)}", "(1, 0) + t(1, 1)", "y = 1 + x", "x = 1 - 2y"),  # direction
        *(
            "no solution",
            "(1 - t, t) or (1 + t, t)",
            "t = -y, x = 1 - t",
            "t = y, x = 1 - 2t",
            "x = 1 + t, y = t (t real)",
        ),
        *("(1,0)+(1,1)t", "t(1,1)+(1,0)", "t(-1,1)-(1,0)"),
    ],
    LINE: ["x = 2 - t, y = s, z = t", "x = 2 - t, y = 2, z = t", "(1, 1, 1)", "x = 2 + z, y = 1"],
    PLANE: ["x = 3 - t, y = t, z = 0", "(3 - s - t, s, 2t)", "(4, 0, 0) + a(-1, 1, 0) + b(-1, 0, 1)"],
}
UNREADABLE = [
    *("x = 2,5; y = -1/3", "x=2,0, y=-1/3", "x = 2, y = 1,200", "(2,0|-1/3)", "(2,5; -1/3)"),
    *(
        "",
        "x + y = 3",
        "not inconsistent",
        "no solution, or x = 1 and y = 0",
        "x = 2 or x = 3, y = 1",
        "x = 2^3, y = 1",
    ),
    *("x = 1 1/2, y = 0", "x = 1/0, y = 1", "x = t*t, y = t", "no solution or infinitely many", "x = 3 - y, y = 1"),
    *(
        "x = 3 - 2 y = 1",
        "t/2(-1,1)+(1,0)",
        "(1,0)+(-1,1)t/2",
        "(1,0)+s(-1,1)t",
        "x = 2 (3, y = 1",
        "-2 x = 2 y = -1/3",
        "no solution (x = 1)",
    ),
    *("x = 1/t, y = t", f"x = {'9' * 50}, y = 1", "does not have infinitely many solutions", "x = 2², y = 1", "hello"),
]
EXAM = LinearSystems(number=1)


def verdict(reference, answer, exam=EXAM):
    return exam.judge(Question("1", "", reference), answer)


@pytest.mark.parametrize("asked", RIGHT, ids=["one", "none", "many", "line", "plane"])
def test_every_form_of_an_answer_to_a_system_is_read(asked):
    for answer in RIGHT[asked]:
        found = verdict(asked, answer)
        assert found.outcome is Outcome.right and found.figures["kind"] == 1, (answer, found)
    for answer in WRONG[asked]:
        assert verdict(asked, answer).outcome is Outcome.wrong, answer


def test_a_fault_of_a_family_is_named():
    for answers, note in ((WRONG[MANY][:4], "of dimension"), (WRONG[MANY][4:14], "other points than the solutions")):
        assert all(note in verdict(MANY, answer).note for answer in answers)
    bare = verdict(MANY, "there are infinitely many solutions")
    assert bare.outcome is Outcome.partly and bare.score == 0.5 and bare.figures["kind"] == 1


FAULTS = {
    "no dimension": (mathematics, "rank", lambda rows: 1),
    "no substitution": (LinearSystem, "holds", lambda self, point: True),
    "all parameters are 0": (LinearExpression, "at", lambda self, values: self.constant),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_of_the_judge_is_noticed(monkeypatch, name):
    assert not any(verdict(MANY, answer).score for answer in WRONG[MANY]), "control"
    monkeypatch.setattr(*FAULTS[name])
    assert any(verdict(MANY, answer).score == 1 for answer in WRONG[MANY])


def test_what_says_two_things_is_unreadable():
    for answer in UNREADABLE:
        for asked in RIGHT:
            found = verdict(asked, answer)
            assert found.score == 0 and (asked is not ONE or found.outcome is Outcome.unreadable), answer


def test_the_documented_forms_are_read():
    """Each form in the docstring is one of the tests' or is read here."""
    text = (answers_text.__doc__ or "").replace("\n  ", " ")
    forms = text.partition("\n\nA number is")[0].split("\n- ")[1:]
    kinds = {one.partition(":")[0]: re.findall(r'"([^"]+)"', one) for one in forms}
    values, family, roots = kinds["Values of a system"], kinds["A family"], kinds["Roots of a quadratic in x"]
    assert [len(found) for found in (values, family, roots)] == [13, 11, 10]
    for answer in values:
        assert read_system(answer.replace("...", "y = -1/3"), ("x", "y")).points == read_system(values[0], "xy").points
    assert all(verdict(MANY, answer).score == 1 for answer in family)
    expected = {"x = 1 ± 2": (-1, 3), "x = 3 (double root)": (3,)}
    assert all(read_roots(answer).roots == expected.get(answer, (2, 3)) for answer in roots)
    numbers = kinds["A number"][:-1]
    assert [read_number(one) for one in numbers] == [12, 12, 12, 1200, Fraction(-5, 2), Fraction(5, 2), 12]


@pytest.mark.parametrize("unknowns", [2, 3])
def test_generated_systems_are_what_they_should_be(unknowns):
    exam = LinearSystems(number=60, unknowns=unknowns)
    questions = exam.questions()
    others = [solution_text(one.reference) for one in questions[1:]]
    for place, (question, other) in enumerate(zip(questions, others, strict=False)):
        nullity = question.reference.nullity
        assert (nullity is None, nullity == 0) == (place % 3 == 1, place % 3 == 0)
        assert exam.judge(question, solution_text(question.reference)).score == 1
        assert exam.judge(question, other).outcome is Outcome.wrong
        last = question.prompt.splitlines()[-2].split(", ")  # the equations as written are those of the reference
        for text, row in zip(last, question.reference.rows, strict=True):
            assert text == f"{signed_sum(list(zip(row, question.reference.unknowns, strict=False)))} = {row[-1]}"
            assert all(row[:-1]), "no equation is solved"
    assert exam.questions() == questions != LinearSystems(number=60, unknowns=unknowns, seed=1).questions()


def test_quadratics_have_the_roots_of_their_equations():
    exam = Quadratics(number=30)
    for place, question in enumerate(exam.questions()):
        roots = question.reference
        equation = question.prompt.splitlines()[-2]
        for root in roots:
            values = {"x^2": root**2, "x": root, "": Fraction(1)}
            terms = [re.fullmatch(r"(-?)(\d*)(.*)", one) for one in equation[:-4].replace(" - ", " + -").split(" + ")]
            value = sum((-1 if one[1] else 1) * int(one[2] or 1) * values[one[3]] for one in terms if one)
            assert value == 0, (equation, root)
        assert len(roots) == (2, 0, 1)[place % 3]
        said = [f"x = {root}" for root in roots]
        forms = [" or ".join(said), f"{{{', '.join(map(str, roots))}}}"] if roots else ["no real solution", "no roots"]
        assert all(exam.judge(question, form).score == 1 for form in forms)
        wrong = [
            "x = 1000",
            "infinitely many",
            "no real roots" if roots else "x = 1",
            *[f"{one}, x = 77" for one in said],
        ]
        assert all(exam.judge(question, form).outcome is Outcome.wrong for form in wrong)
        half = exam.judge(question, said[0]) if place % 3 == 0 else None
        assert half is None or half.outcome is Outcome.partly


COMPLEX = ["x = 1 ± 2i", r"x = 1 \pm i\sqrt{3}", "x = 2i or x = -2i"]


def test_complex_roots_may_follow_no_real_solution():
    for complex_roots in COMPLEX:
        for text in (f"no real solution: {complex_roots}", f"It does not have real solutions ({complex_roots})."):
            assert read_roots(text) == RootsAnswer(Claim.none, ()), text
        for text in (
            complex_roots,
            f"no real solution: x = 1, {complex_roots}",
            f"no solution, i think x = 2, {complex_roots}",
        ):
            with pytest.raises(UnreadableAnswer):
                read_roots(text)
    assert read_roots("no real roots, since the discriminant is -16").claim is Claim.none


LISTS = {
    r"x = 2 \text{ or } x = 3": (2, 3),
    r"x = 2 \quad \text{or} \quad x = 3": (2, 3),
    "x = 2, or 3": (2, 3),
    "x = 2 x = 3": (2, 3),
    "- 2 and 3": (-2, 3),
    "- 2\n3": (-2, 3),
    "- 2\n- 3": (2, 3),
    "-2\n-3": (-3, -2),
    "1. 2\n2. 3": (2, 3),
    "- x = 2 or x = 3": (2, 3),
    "- (1/2) and 3": (Fraction(-1, 2), 3),
}
NUMBERS = {
    "- 12": -12,
    "* 12": 12,
    "22. That is the cost": 22,
    r"12 \text{ tickets}": 12,
    "1. 3 + 4 = 7\n2. 7 + 5 = 12": 12,
}


def test_a_bullet_takes_no_sign_and_no_number():
    assert {text: read_roots(text).roots for text in LISTS} == LISTS
    assert {text: read_number(text) for text in NUMBERS} == NUMBERS
    for text in ("45. Ana is 12 then", "2. 5", "- 12\n- 13"):
        with pytest.raises(UnreadableAnswer):
            read_number(text)


def test_word_problems_are_judged_by_their_number():
    exam = WordProblems(number=10)
    for question in exam.questions():
        number = question.reference
        for form in (f"{number}", f"2 + 3 = {number} dollars.", f"So the answer is {float(number)}", f"${number}"):
            assert exam.judge(question, form).score == 1, form
        assert exam.judge(question, str(number + 1)).outcome is Outcome.wrong
        assert exam.judge(question, f"{number} or {number + 1}").outcome is Outcome.unreadable


@pytest.mark.parametrize(
    "text",
    [
        "(" * 4000,
        "t(" * 1500,
        "1(" * 2000,
        "(t+" * 1300,
        "x = " * 1000,
        "x=1+" * 1000,
        "(1," * 1300,
        "1+" * 2000,
        "\\frac{" * 600,
        "A(" + "," * 3990,
    ],
)
def test_a_hostile_answer_is_read_quickly(text):
    for read in (lambda: read_system(text, ("x", "y", "z")), lambda: read_roots(text), lambda: read_number(text)):
        try:
            read()
        except UnreadableAnswer as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["t(" * 300, "1(" * 300, "x = " + "(t+" * 200, "(" * 300 + "1" + ")" * 300])
def test_deep_parentheses_are_read_in_a_few_passes(text, monkeypatch):
    """Control: without the nesting that is found first, each is read from all its places, to the deepest allowed."""
    counts = {}
    for name in ("nesting", "none"):
        calls, read = [], Scanner._factor
        with monkeypatch.context() as patch:
            patch.setattr(Scanner, "_factor", lambda *given: calls.append(given) or read(*given))  # noqa: B023
            if name == "none":
                patch.setattr(Scanner, "_nesting", lambda self: dict.fromkeys(range(len(self.tokens)), 1))
            with contextlib.suppress(UnreadableAnswer):
                Scanner(text, ("x", "y")).tuples()
        counts[name] = len(calls)
    assert counts["nesting"] <= 3 * len(text) < 4 * len(text) < counts["none"]
