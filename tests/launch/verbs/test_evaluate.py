"""`evaluate` and `generate`: texts and several ranks; what cannot be meant or read is refused in one line."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import build
from core.exit_codes import CRASHED
from launch import agent
from launch.cli import main
from launch.verbs.evaluate import EvaluateConfig
from model.huggingface import load
from tests.support.tiny import TINY
from train.eval import text_files
from train.eval.scoring_model import from_directory, from_transformers, open_stored
from train.eval.text_files import read_texts
from train.exam.ask import greedy_answers
from train.exam.knowledge import MultipleChoice

TWO_RANKS = ["launch=torchrun", "launch.processes=2"]
TEXTS = ["the model reads", " ".join(["a line öü\n"] * 40), "x", ""]


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_corpus) -> Path:
    """Return a folder with a short `run`, its export `exported`, the import of that `imported`, and `texts`."""
    root = tmp_path_factory.mktemp("models")
    line = ["train", *TINY, *small_corpus, "model.balance.bias_rate=0", f"run.root={root}", "run.name=run"]
    assert main([*line, "training.steps=3", "optimizer.lr=0.01"]) == 0
    assert main(["export", str(root / "run"), str(root / "exported")]) == 0
    assert main(["import", str(root / "exported"), str(root / "imported")]) == 0
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text(TEXTS[0])
    (root / "texts" / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:]))
    return root


@pytest.fixture
def printed(capsys) -> Callable[..., str]:
    """Return a function that runs `leviathan WORDS` with success and returns its standard output."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ["run", "exported", "imported"])
@torch.no_grad()
def test_the_loss_of_a_text_equals_plain_arithmetic(models, printed, name):
    """The texts are shorter and longer than the context; later windows see half a context before."""
    found = json.loads(printed("evaluate", str(models / name), f"text={models / 'texts'}", "micro_batch_size=2"))
    stored = open_stored(models / "exported")
    network, tokenizer = load(models / "exported"), stored.tokenizer
    context = 48 if name == "run" else stored.context
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode([text])[0]]
        end = 0
        while end < len(ids) - 1:
            first, end = end, min(end + (context if not end else context // 2), len(ids) - 1)
            row = torch.tensor(ids[max(0, end - context) : end + 1])
            logp = network(row[None, :-1])[0].log_softmax(-1).gather(1, row[1:, None])[:, 0]
            nats, tokens = nats - float(logp[first - end :].sum()), tokens + end - first
    size = len("".join(TEXTS).encode())
    assert (found["tokens"], found["bytes"], found["documents"]) == (tokens, size, 4)
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert found.get("step") == (3 if name == "run" else None)


def test_groups_of_a_text_do_not_change_its_loss(models, printed, monkeypatch):
    words = ["evaluate", str(models / "exported"), f"text={models / 'texts'}"]
    one = json.loads(printed(*words))
    monkeypatch.setattr(text_files, "GROUP", 1)
    many = json.loads(printed(*words))
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-6) and many["tokens"] == one["tokens"]
    monkeypatch.setattr(text_files, "read_texts", lambda pattern: list(read_texts(pattern))[:-2])
    assert json.loads(printed(*words))["loss"] != pytest.approx(one["loss"], rel=1e-6), "control"


def one_question(folder: Path) -> list[str]:
    """Return overrides of a suite of one short question, which fits the models' context."""
    (folder / "q.jsonl").write_text(
        json.dumps({"id": "1", "question": "?", "choices": ["11", "22"], "answer": 0}) + "\n"
    )
    options = f"{{path: '{folder / 'q.jsonl'}'}}"
    return ["suite=own", f"+suite.exams.short={{exam: multiple_choice, options: {options}}}"]


@pytest.mark.parametrize("name", ["run", "exported", "imported"])
def test_a_suite_is_asked_of_every_kind_of_model(models, printed, tmp_path, name):
    """The answer is what `generate` prints. The run keeps the results, which can be compared with those of `out`."""
    words = ["evaluate", str(models / name), *one_question(tmp_path), f"out={tmp_path / 'out.json'}"]
    found = json.loads(printed(*words))
    kept = json.loads((tmp_path / "out.json").read_text())
    (answer,) = kept["exams"]["short"]["answers"]
    prompt = "?\nA. 11\nB. 22\nAnswer:"
    text = printed("generate", str(models / name), f"prompt={prompt}", "temperature=0", "tokens=24")
    assert text.removeprefix(prompt).removesuffix("\n").startswith(answer["answer"])
    assert found["exams"]["short"]["outcomes"] == kept["exams"]["short"]["outcomes"] and found["suite"] == "own"
    assert found["step"] == (3 if name == "run" else None) and "answers" not in found["exams"]["short"]
    lines = models / name / "evaluations.jsonl"
    assert lines.exists() == (name == "run")
    if name == "run":
        assert json.loads(lines.read_text()) == kept
        again = json.loads(printed(*words, f"against={models / name}"))
        assert again["against"]["short"]["p_value"] == 1 and len(lines.read_text().splitlines()) == 2


@pytest.mark.slow
def test_transformers_answers_an_exam_as_our_model_does(models, tmp_path):
    """The same weights through both: equal answers. Control: another model."""
    one_question(tmp_path)
    exam, folder = MultipleChoice(str(tmp_path / "q.jsonl")), models / "exported"
    device = torch.device("cpu")
    ours = greedy_answers(from_directory(folder, device))(exam.questions())
    assert greedy_answers(from_transformers(str(folder), device))(exam.questions()) == ours != [""]
    broken = from_directory(folder, device)
    for parameter in broken.network.parameters():
        torch.nn.init.normal_(parameter)
    assert greedy_answers(broken)(exam.questions()) != ours


def test_a_suite_that_cannot_be_asked_is_one_line(models, refused, fake_ranks, tmp_path):
    exported, short = str(models / "exported"), one_question(tmp_path)
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "a " * 999, "choices": ["11", "22"], "answer": 0}))
    for words, reason in {
        ("suite=none",): "suite=none: no such choice; try code, own, scenes, smoke or text",
        ("suite=own",): "suite=own: has no examination: add +suite.exams.NAME=",
        ("suite=own", "+suite.exams.a={exam: x}"): "suite.exams.a.exam=x: no such examination; try linear_systems",
        ("suite=own", "+suite.exams.a={exam: scenes, options: {number: 1}}"): "the model has no tokens or no encoder",
        tuple(short): "tokens, but the model's context is",
        (*short, "against=nothing"): "against=nothing: cannot be read",
        ("suite=smoke", "tasks=[a]"): "suite=smoke: cannot be combined with tasks or a text",
        ("suite=smoke", "limit=2"): "limit=2: applies to tasks only",
        ("suite=smoke", "sequences=2"): "applies to the held-out loss, not to a suite",
        ("against=x",): "against=x: applies to suites only",
    }.items():
        assert reason in refused("evaluate", exported, *words), words
    assert fake_ranks.nodes == []


class FakeRanks:
    """Replaces the agent: rank 0 prints `printed`, and the ranks end with `code`."""

    def __init__(self) -> None:
        self.printed, self.code, self.nodes, self.configs = b"", 0, list[agent.Node](), list[Any]()

    def __call__(self, node: agent.Node) -> int:
        self.nodes.append(node)
        self.configs.append(json.loads(Path(node.command[-1]).read_text()))
        for rank in range(node.ranks):
            (node.logs / f"rank-{rank:05d}").mkdir(parents=True)
            (node.logs / f"rank-{rank:05d}" / "000.out").write_bytes(self.printed if rank == 0 else b"other")
        if self.code == 130:
            raise agent.AgentInterrupted(15)
        return self.code


@pytest.fixture
def fake_ranks(monkeypatch) -> FakeRanks:
    fake = FakeRanks()
    monkeypatch.setattr(agent, "run", fake)
    return fake


@pytest.mark.parametrize("words", [["evaluate"], ["generate", "a\r\n${b}"]], ids=["evaluate", "generate"])
def test_the_output_of_rank_0_is_printed_once(models, fake_ranks, capfdbinary, words):
    fake_ranks.printed = "é\r\n\0two lines\n".encode()
    capfdbinary.readouterr()
    assert main([words[0], str(models / "run"), *words[1:], *TWO_RANKS]) == 0
    assert capfdbinary.readouterr() == (fake_ranks.printed, b"")
    (node,), (config,) = fake_ranks.nodes, fake_ranks.configs
    assert node.ranks == 2 and node.command[:3] == ("-m", "launch.rank", words[0]) and not node.shows_output
    assert config["run"] == str(models / "run") and config["launch"] == {}, "the ranks start no ranks"
    assert config.get("prompt", "a\r\n${b}") == "a\r\n${b}"
    assert not node.logs.exists() and not Path(node.command[-1]).exists()


@pytest.mark.parametrize("code, seen", [(CRASHED, 1), (1, 1), (2, 2), (130, 130)])
def test_exit_codes_of_ranks_and_their_logs(models, fake_ranks, capsys, code, seen):
    """Only after a crash are the logs kept, and named. Ranks print other errors themselves."""
    fake_ranks.code, fake_ranks.printed = code, b"half a result"
    capsys.readouterr()
    assert main(["evaluate", str(models / "run"), *TWO_RANKS]) == seen
    logs, said = fake_ranks.nodes[0].logs, capsys.readouterr()
    assert said.out == "" and (str(logs) in said.err) == logs.exists() == (code == CRASHED)
    shutil.rmtree(logs, ignore_errors=True)


WRONG_LAUNCH = {
    "launch=slurm": "launch.kind=slurm: this verb runs on this machine only; in a SLURM job, use launch=torchrun",
    "launch=torchrun launch.nodes=2": "launch.nodes=2: this verb runs on this machine only; remove it",
    "launch=torchrun launch.rendezvous=a:1": "launch.rendezvous=a:1: this verb runs on this machine only",
    "launch=torchrun launch.processes=100000": "launch.processes=100000: this machine has",
    "launch=torchrun launch.processes=0": "launch.processes=0: must be positive",
    "launch=torchrun +launch.proceses=2": "launch.proceses: no such key; try launch.processes",
    "launch=x": "launch=x: no such choice",
    "launch=null": "launch",
}


@pytest.mark.parametrize("words", WRONG_LAUNCH)
@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_a_wrong_launch_is_one_line(models, refused, fake_ranks, verb, words):
    assert refused(verb, str(models / "run"), *words.split()).startswith(WRONG_LAUNCH[words])
    assert fake_ranks.nodes == []


@pytest.mark.parametrize("kind", ["tasks", "suite"])
def test_tasks_and_suites_reach_the_ranks(models, fake_ranks, tmp_path, kind):
    words = ["tasks=[a]", "limit=2"] if kind == "tasks" else one_question(tmp_path)
    assert main(["evaluate", str(models / "run"), *words, *TWO_RANKS]) == 0
    (config,) = fake_ranks.configs
    built = build(EvaluateConfig, config)
    assert built.tasks == (["a"] if kind == "tasks" else [])
    assert built.suite is None or list(built.suite.exams) == ["short"]
    assert (built.suite is None) == (kind == "tasks")


def test_ranks_do_not_start_ranks(models, refused, fake_ranks, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert "torchrun has started the ranks already" in refused("evaluate", str(models / "run"), *TWO_RANKS)
    assert fake_ranks.nodes == []


def test_a_text_that_cannot_be_read_is_one_line(models, refused, tmp_path):
    """Control: `test_the_loss_of_a_text_equals_plain_arithmetic`."""
    contents = {"a.txt": b"\xff\xfe", "b.jsonl": b'{"x": 1}\n', "c.jsonl": b"{", "d.bin": b"text", "e.txt": b""}
    contents |= {"f.jsonl.gz": b"no archive", "g.parquet": b"PAR1", "h.jsonl": b'{"text": "\\ud800"}', "i.txt": b"ab\0"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "fifo.txt")
    exported = str(models / "exported")
    for name, part in {
        "a.txt": "cannot be read: 'utf-8' codec",
        "b.jsonl": "b.jsonl:1: cannot be read",
        "c.jsonl": "c.jsonl:1: cannot be read",
        "d.bin": "unknown suffix; try .jsonl",
        "e.txt": "holds no text",
        "f.jsonl.gz": "cannot be read",
        "g.parquet": "cannot be read",
        "h.jsonl": "half of a surrogate pair",
        "fifo.txt": "is neither file nor folder",
        "nothing": "no such file or folder",
        "*.png": "no such file or folder",
    }.items():
        line = refused("evaluate", exported, f"text={tmp_path / name}")
        assert line.startswith("text=") and part in line, line
    assert main(["evaluate", exported, f"text={tmp_path / 'i.txt'}"]) == 0, "a NUL character is text"


def test_what_to_give_for_a_model_is_one_line(models, refused):
    exported, text = str(models / "exported"), f"text={models / 'texts'}"
    assert "is a model without held-out text: add text=FILES or tasks=[...], or suite=NAME" in refused(
        "evaluate", exported
    )
    assert refused("evaluate", exported, text, "backend=native").startswith("backend=native: applies to runs only")
    assert "drop" in refused("evaluate", exported, text, "tasks=[a]")
    assert "not to a text" in refused("evaluate", exported, text, "sequences=2")


HOSTILE = {
    "run": ["nothing", "a_file", "empty", "a_file/below", "", "~nobody/x", "a" * 300, "\0", "${oc.env:HOME}"],
    "prompt": ["\0", "\udcff", "a" * 3 + "\0"],
    "temperature": ["nan", "-1", "inf", "x", "-0.1", "null"],
    "tokens": ["0", "-1", str(10**12), str(10**30), "1.5", "x", "null"],
    "top_k": ["0", "-1", "x", "1.5"],
    "seed": ["x", str(10**30), "null"],
    "backend": ["x", "native"],
    "launch": ["3", "[]", "{kind: inline, x: 1}"],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in HOSTILE.items() for value in values])
def test_a_hostile_key_of_generate_is_one_line(models, capsys, monkeypatch, tmp_path, key, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "empty").mkdir()
    words = {"run": f"run={models / 'exported'}", "tokens": "tokens=1", key: f"{key}={value}"}
    capsys.readouterr()
    code = main(["generate", *words.values()])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("leviathan: error: ") and "internal error" not in line and code in (1, 2)
    if key == "run":
        assert main(["evaluate", words["run"]]) == code and capsys.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize(
    "word",
    [
        *("prompt=", "prompt=${oc.env:HOME} ${x", "prompt=é😀\u202e", "temperature=1e-320", "temperature=1e308"),
        *("temperature=0", f"top_k={2**62}", "top_k=null", f"seed={2**63 - 1}", f"seed={-(2**63) + 1}"),
    ],
)
def test_an_unusual_key_of_generate_is_accepted(models, printed, word):
    given = word.removeprefix("prompt=") if word.startswith("prompt=") else "the"
    found = printed("generate", f"run={models / 'exported'}", f"prompt={given}", "tokens=2", word)
    assert found.startswith(given) and found.endswith("\n")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def absent(path: Path) -> None:
    path.unlink()


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" * 99)


def a_list(path: Path) -> None:
    path.write_text("[]")


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return a function that rewrites the header of a safetensors file."""

    def write(path: Path) -> None:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        found = json.loads(content[8 : 8 + size])
        name = next(key for key in found if key != "__metadata__")
        change(found[name])
        text = json.dumps(found).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return write


def huge_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def set_context(value: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": value}))

    return write


DAMAGE = {
    "config.json": [truncated, folder, fifo, binary, a_list, set_context("x"), set_context(-1), set_context([2])],
    "tokenizer.json": [truncated, folder, fifo, absent, binary, a_list],
    "tokenizer_config.json": [truncated, folder, fifo, absent, binary, a_list],
    "model.safetensors": [
        *(truncated, folder, fifo, absent, binary, huge_header),
        header(lambda entry: entry.update(data_offsets=[0, 2**50])),
        header(lambda entry: entry.update(data_offsets=[-8, 0])),
        header(lambda entry: entry.update(shape=[-1, 2])),
        header(lambda entry: entry.update(dtype="X9")),
        header(lambda entry: entry.clear()),
    ],
}


@pytest.mark.parametrize("name, number", [(name, i) for name, damages in DAMAGE.items() for i in range(len(damages))])
def test_a_damaged_export_is_one_line(models, capsys, tmp_path, name, number):
    """Control: the undamaged directory is evaluated above."""
    model = Path(shutil.copytree(models / "exported", tmp_path / "model"))
    DAMAGE[name][number](model / name)
    for words in (["evaluate", str(model), f"text={models / 'texts'}"], ["generate", str(model), "x", "tokens=1"]):
        capsys.readouterr()
        began = time.monotonic()
        assert main(words) in (1, 2) and time.monotonic() - began < 5
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("leviathan: error: ") and "internal error" not in line, line


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(models, command):
    text = f"text={models / 'texts'}"
    for words in (["evaluate", "run"], ["evaluate", "run", text], ["evaluate", "exported", text]):
        words[1] = str(models / words[1])
        one, two = command(*words), command(*words, *TWO_RANKS)
        assert (one.returncode, two.returncode, two.stderr) == (0, 0, "")
        numbers = [numbers_of(json.loads(done.stdout)) for done in (one, two)]
        assert numbers[0].keys() == numbers[1].keys() and numbers[0] == pytest.approx(numbers[1], rel=1e-6)
    for name in ("run", "imported"):
        words = ["generate", str(models / name), "the model", "tokens=12"]
        assert command(*words).stdout == command(*words, *TWO_RANKS).stdout != ""
    wrong = command("evaluate", str(models / "run"), "text=nothing", *TWO_RANKS)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "leviathan: error: text=nothing: no such file or folder\n"


def numbers_of(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in tree.items():
        found |= numbers_of(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
