"""What is read from answers and task files, and the refusals: without a sandbox."""

from __future__ import annotations

import io
import json
import os
import struct

import pytest

from core.errors import ConfigError
from train.exam.base import Outcome, Question, Verdict, fingerprint
from train.exam.code import proof, sandbox
from train.exam.code.browser import Browser, Page, PageError
from train.exam.code.harness import EndedError, Remote, decode, encode, examine, parsable
from train.exam.code.pages import PAGE_PROMPT, PAGE_TASKS, Pages, page_of
from train.exam.code.programs import OWN, ProgrammingProblem, Programs, program_of, read_problems
from train.exam.code.sandbox import Limit, Limits, Sandbox, SandboxError, SandboxResult, held_memory
from train.exam.code.seccomp import system_call_filter
from train.exam.run import run_exam

PROMPT = 'import math\n\n\ndef area(r: float) -> float:\n    """Return the area of a circle."""\n'
BODY = "    return math.pi * r**2"
PROBLEM = ProgrammingProblem(
    PROMPT, "area", "def check(candidate):\n    assert candidate(0) == 0\n    assert round(candidate(1)) == 3\n"
)


def passes(code: str | None) -> bool:
    space: dict = {}
    exec(parsable(code or ""), space)
    return "area" in space and space["area"](1) == pytest.approx(3.14159, abs=1e-4)


@pytest.mark.parametrize(
    "answer",
    [
        BODY,
        BODY + "\n\nThe area grows with the square.\n",
        BODY + "\n\n\nprint(area(1)\n",
        f"Here it is:\n```python\n{PROMPT}{BODY}\n```\nDone.",
        f"```py\ndef area(r):\n{BODY}\n```",
        f"```\ndef area(r):\n{BODY}",
        f"```python\nimport os\n```\nor\n```python\ndef area(r):\n{BODY}\n```",
        f"```python\n{BODY}\n```",
        f"def area(r):\n{BODY}\nI hope that this helps.",
        "import math as m\n\ndef square(r):\n    return r**2\n\ndef area(r):\n    return m.pi * square(r)",
        "Note: the helper comes first.\n\n    See below.\n\nPI = 3.14159\n\nThen:\n\ndef area(r):\n    return PI * r**2",
        f"from functools import cache\n\n@cache\ndef area(r):\n{BODY}\n\nDone: the area.",
        "if True:\n    N = 1\nelse:\n    N = 2\nN += 1\ndef area(r):\n    return math.pi * r**N\nif it helps, use it",
        "    return PI * r**2\n\nPI = 3\nPI += math.pi\ntry:\n    PI -= ONE\nexcept NameError:\n    PI -= 3\n\nONE = 1\n",
        "    return PI * r**n()\nfor PI in [math.pi]:\n    pass\n\nwith open(0, closefd=False):\n    def n():\n        return 2\n",
    ],
)
def test_the_program_is_found_in_an_answer(answer):
    assert passes(program_of(PROBLEM, answer))


CALLS = "def area(r):\n    return PI * square(r)"
HELPERS = "def square(x):\n    return times(x, x)"
BLOCKS = {
    "helper after": [CALLS.replace("PI", "math.pi"), "def square(x):\n    return x * x"],
    "helpers of helpers": ["PI: float = 3.14159", CALLS, HELPERS, "from operator import mul as times"],
    "examples": [f"def area(r):\n{BODY}", "print(1 / 0)", ">>> area(1)\n3.14", "r = 1\nassert area(r) == 3"],
    "tests": [f"def area(r):\n{BODY}", "import pytest\n\ndef test_area():\n    assert area(1) == 3"],
    "another version": [f"def area(r):\n{BODY}", "def area(r):\n    return 0"],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_fenced_blocks_that_are_needed_are_joined(name):
    answer = "First.\n" + "\nThen:\n".join(f"```python\n{one}\n```" for one in BLOCKS[name])
    assert passes(program_of(PROBLEM, answer))
    if name.startswith("helper"):
        with pytest.raises(NameError):  # control: the helpers are needed
            passes(program_of(PROBLEM, f"```python\n{CALLS}\n```"))


def test_prose_before_a_definition_is_no_code():
    prose = "Note: the area.\nAnswer: x\nfrom here on\nif so, then\narea(r) is the area.\n\n  an item\n"
    assert program_of(PROBLEM, f"{prose}\ndef area(r):\n{BODY}").split() == f"import math def area(r): {BODY}".split()


@pytest.mark.parametrize("answer", ["", "I do not know.", "```\n```", "return 3"])
def test_an_answer_without_code_is_unreadable(answer):
    assert program_of(PROBLEM, answer) is None


@pytest.mark.parametrize(
    "answer",
    [
        "<!DOCTYPE html><p>x</p></html>",
        "Sure!\n```html\n<!DOCTYPE html><p>x</p></html>\n```\nDone",
        "Sure: <!DOCTYPE html><p>x</p></html> done",
    ],
)
def test_the_page_is_found_in_an_answer(answer):
    assert page_of(answer).strip() == "<!DOCTYPE html><p>x</p></html>"


def test_an_answer_without_a_page_is_unreadable():
    assert page_of("a < b and b > c") is None


def pipe():
    read, write = os.pipe()
    return os.fdopen(read, "rb"), os.fdopen(write, "wb")


class Ended:
    """A browser that has ended, or whose pipe for commands is still open."""

    def __init__(self, limit: Limit | None, listens: bool):
        (self.commands, self.stdin), (self.stdout, self.answers) = pipe(), pipe()
        self.limit = limit
        if not listens:
            self.commands.close()

    def finish(self) -> SandboxResult:
        return SandboxResult(None, None, self.limit, b"", b"gone", 1.0)


@pytest.mark.parametrize(("limit", "error"), [(Limit.wall, PageError), (None, SandboxError)])
def test_a_dialog_of_an_ended_browser_tells_the_limit(limit, error):
    dialog = {"method": "Page.javascriptDialogOpening"}
    with pytest.raises(error, match="limit of wall time" if limit else "the browser ended: gone"):
        Page(Ended(limit, listens=False))._handle(dialog)
    browser = Ended(limit, listens=True)
    Page(browser)._handle(dialog)
    browser.stdin.close()
    assert b"handleJavaScriptDialog" in browser.commands.read()


@pytest.mark.parametrize(
    "value",
    [None, True, -(10**30), 1.5, "a\n\x00é", b"\xff", 1 + 2j, [1, (2, {3}), frozenset([4])], {(1, 2): [None], "a": {}}],
    ids=str,
)
def test_values_cross_between_the_sandboxes(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and type(back) is type(value)


def test_what_a_program_overrides_does_not_cross():
    class Liar(list):
        def __eq__(self, other):
            return True

        __hash__ = None

    assert Liar([1]) == [2]
    assert decode(encode(Liar([1]))) != [2]
    with pytest.raises(TypeError, match="cannot be compared"):
        encode(object())


def said(*lines: object) -> Remote:
    return Remote(io.StringIO("".join(f"{json.dumps(line)}\n" for line in lines)), io.StringIO())


def test_the_tests_judge_by_what_a_program_returns():
    def failure(*lines):
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        return examine(PROBLEM.prompt, PROBLEM.test, io.StringIO(text), io.StringIO())

    assert failure(["ready"], ["value", 0], ["value", 3.1]) == ""
    assert failure(["ready"], ["value", 0], ["value", 4]) == "AssertionError"
    assert failure(["ready"], ["value", 0]) == "the program ended early or returned too much"
    assert failure(["ready"], ["passed"]) == "the program wrote to the channel of its tests"
    assert failure(["failed", "SyntaxError", "bad"]) == "SyntaxError bad"
    assert failure(["ready"], ["raised", "KeyError", "x"]) == "KeyError: 'x'"


def test_an_exception_of_a_program_reaches_its_tests():
    with pytest.raises(ValueError, match="bad"):
        said(["raised", "ValueError", "bad"])(1)
    with pytest.raises(EndedError, match="SystemExit"):
        said(["raised", "SystemExit", "0"])(1)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", ":1: is not JSON"),
        ('{"task_id": "a", "prompt": "p", "entry_point": "f"}', ":1: it has no 'test'"),
        ('{"task_id": 1, "prompt": "p", "entry_point": "f", "test": "t"}', ":1: task_id is not text"),
        ('{"task_id": "a", "prompt": "p", "entry_point": "f(", "test": "t"}', ":1: entry_point 'f(' is not a name"),
        (
            '{"task_id": "a", "prompt": "p", "entry_point": "f", "test": "t"}\n' * 2,
            ":2: the task_id 'a' is also that of ",
        ),
        ("\n", ": holds no question"),
        ("[" * 100_000, ":1: is"),
    ],
)
def test_a_broken_file_of_problems_is_refused(tmp_path, text, complaint):
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_problems(path)
    assert complaint in str(caught.value)


def test_the_questions_about_pages_are_short():
    """The smoke run's tokenizer makes a token of 2 to 2.4 of their characters, and its context has 256 tokens."""
    assert max(len(PAGE_PROMPT.format(task=task.text)) for task in PAGE_TASKS) < 530
    with pytest.raises(ConfigError, match="tasks=tetris: no such page; try snake, counter"):
        Pages(tasks=["tetris"])


def test_our_own_problems_are_complete():
    questions = read_problems(OWN)
    assert len(questions) == 10 == len({question.id for question in questions})


@pytest.mark.parametrize("make", [Programs, Pages, Browser, Sandbox])
def test_without_bubblewrap_the_install_line_is_shown(monkeypatch, make):
    monkeypatch.setattr(sandbox.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="which needs bwrap; install it: apt install bubblewrap"):
        make()


def test_without_user_namespaces_the_exam_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "needed", lambda *_: "/bin/false")
    monkeypatch.setattr(proof, "python_command", lambda: ["python3"])
    with pytest.raises(ConfigError, match=r"cannot be set up; permit user namespaces"):
        proof.prove.__wrapped__()


STATUS = (
    b"Name:\t%s\nUmask:\t0022\nVmRSS:\t 900 kB\nRssAnon:\t 100 kB\nRssShmem:\t 20 kB\nVmSwap:\t 3 kB\nThreads:\t1\n"
)


@pytest.mark.parametrize(
    "name", [b"python3", b"\xff\xfe", b"\x0bVmSwap: -99999", b"\x85RssAnon: -99", b"\nVmSwap: -99999", b"\\n:", b"a: b"]
)
def test_a_name_does_not_change_the_memory(name):
    assert held_memory(STATUS % name) == 123 * 1024
    assert held_memory(b"Name:\tkthreadd\n") == 0


def test_limits_must_be_positive():
    with pytest.raises(ConfigError, match="processes=0"):
        Limits(processes=0)


def test_the_filter_refuses_the_listed_system_calls():
    for machine, architecture, memfd_create, read in (("x86_64", 0xC000003E, 319, 0), ("aarch64", 0xC00000B7, 279, 63)):
        program = list(struct.iter_unpack("=HBBI", system_call_filter(machine)))
        assert run_filter(program, architecture, memfd_create) == 0x00050001
        assert run_filter(program, architecture, read) == 0x7FFF0000
        assert run_filter(program, architecture, 0x40000000 | read) == 0x00050001
        assert run_filter(program, 0x40000003, read) == 0x80000000
    with pytest.raises(ConfigError, match="riscv64"):
        system_call_filter("riscv64")


def run_filter(program: list[tuple[int, int, int, int]], architecture: int, number: int) -> int:
    """Interpret a filter of classic BPF."""
    place = accumulator = 0
    while True:
        code, if_true, if_false, operand = program[place]
        match code:
            case 0x20:
                accumulator, jump = {0: number, 4: architecture}[operand], 0
            case 0x15:
                jump = if_true if accumulator == operand else if_false
            case 0x35:
                jump = if_true if accumulator >= operand else if_false
            case 0x06:
                return operand
        place += 1 + jump


def test_a_fingerprint_covers_the_problems(tmp_path):
    class Asked:
        name, version = "programs", 1

        def __init__(self, path):
            self.path = path

        def questions(self):
            return read_problems(self.path)

        def judge(self, question, answer):
            raise NotImplementedError

    other = tmp_path / "other.jsonl"
    other.write_text(OWN.read_text().replace("candidate([]) == []", "candidate([]) == [1]"))
    assert fingerprint(Asked(OWN)) == fingerprint(Asked(OWN)) != fingerprint(Asked(other))


class InSandbox:
    name, version = "programs", 1

    def __init__(self, limits, path=""):
        self.limits, self.path = limits, path

    def questions(self):
        return [Question("a", "Say yes.")]

    def judge(self, question, answer):
        return Verdict(Outcome.right, 1.0)

    def machine(self):
        return {"python": "Python 3.11.2"}


class Plain:
    name, version = InSandbox.name, InSandbox.version
    questions, judge = InSandbox.questions, InSandbox.judge


def test_a_fingerprint_covers_the_limits_but_no_path():
    own = fingerprint(InSandbox(Limits()))
    assert own == fingerprint(InSandbox(Limits(), "/elsewhere"))
    assert len({own, fingerprint(InSandbox(Limits(cpu_s=6))), fingerprint(Plain())}) == 3


def test_a_result_names_the_programs_of_the_machine():
    assert run_exam(InSandbox(Limits()), lambda _: ["yes"]).plain()["machine"] == {"python": "Python 3.11.2"}
    assert run_exam(Plain(), lambda _: ["yes"]).plain()["machine"] == {}
