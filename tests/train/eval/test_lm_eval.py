"""The evaluation harness gives the same metrics and continuations for our model and for its export in transformers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from launch.cli import main
from model.attention.plan import ForwardContext
from parallel.comm.world import World
from tests.support.hf_models import train_and_export
from tests.support.tiny import TINY
from train.eval.lm_eval import HarnessModel, _generation, open_scoring_model

TASKS = Path(__file__).with_name("tasks")
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True, scope="module")
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(Path(__file__).parents[3])  # paths in the task files start here
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_corpus) -> Path:
    """Train a short run without selection biases, export it, and import the export again."""
    root = tmp_path_factory.mktemp("harness")
    train_and_export(root, *small_corpus)
    assert main(["import", str(root / "exported"), str(root / "imported")]) == 0
    return root


def evaluated(path: Path, out: Path) -> dict[str, Any]:
    assert main(["evaluate", str(path), "tasks=[next_word,go_on]", f"task_path={TASKS}", f"out={out}"]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def ours(trained) -> dict[str, Any]:
    """Return the harness's results for the run's own model."""
    return evaluated(trained / "run", trained / "ours.json")


def answers(samples: dict[str, Any]) -> tuple[list[list[float]], list[str]]:
    """Return the log-likelihoods of each question's choices, and the continuations."""
    choices = [[float(r[0][0]) for r in sample["resps"]] for sample in samples["next_word"]]
    return choices, [sample["resps"][0][0] for sample in samples["go_on"]]


def test_the_run_and_the_exported_model_agree(trained, ours):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    theirs: Any = simple_evaluate(
        "hf",
        model_args={"pretrained": str(trained / "exported"), "dtype": "float32"},
        tasks=["next_word", "go_on"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    for task, metric in (("next_word", "acc,none"), ("go_on", "exact_match,none")):
        assert ours["results"][task][metric] == theirs["results"][task][metric]
    (mine, texts), (other, their_texts) = answers(ours["samples"]), answers(theirs["samples"])
    assert texts == their_texts and any(texts)
    for a, b in zip(mine, other, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


@pytest.mark.parametrize("name", ["exported", "imported"])
def test_other_forms_of_the_model_give_the_same(trained, ours, tmp_path, name, capsys):
    found = evaluated(trained / name, tmp_path / "found.json")
    assert "next_word" in capsys.readouterr().out
    for a, b in zip(answers(ours["samples"])[0], answers(found["samples"])[0], strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_another_model_gives_other_figures(ours, tmp_path, small_corpus):
    line = ["train", *TINY, *small_corpus, f"run.root={tmp_path}", "run.name=other", "training.seq_len=64"]
    assert main([*line, "training.steps=1", "run.seed=9"]) == 0
    other, _ = answers(evaluated(tmp_path / "other", tmp_path / "b.json")["samples"])
    assert abs(answers(ours["samples"])[0][0][0] - other[0][0]) > 0.1


@torch.no_grad()
def test_log_likelihoods_against_plain_arithmetic(trained):
    """Compare texts shorter and longer than the context, in batches, and a whole document in windows."""
    who = open_scoring_model(trained / "run", ALONE)
    harness = HarnessModel(who, batch_size=3)
    ids = [(7 * i) % 290 for i in range(100)]

    def plain(context: list[int], continuation: list[int]) -> float:
        row = (context + continuation)[-(who.context + 1) :]
        positions = torch.arange(len(row) - 1)[None]
        logp = who.network(torch.tensor([row[:-1]]), ForwardContext(positions)).log_softmax(-1)[0]
        return sum(float(logp[len(row) - 1 - len(continuation) + i, t]) for i, t in enumerate(continuation))

    pairs = [(ids[:begin], ids[begin:end]) for begin, end in ((3, 9), (1, 2), (90, 100), (40, 44), (5, 7))]
    found = harness._loglikelihood_tokens([(None, *pair) for pair in pairs])
    for pair, (total, _) in zip(pairs, found, strict=True):
        assert total == pytest.approx(plain(*pair), abs=1e-4)
    greedy = [int(who.network(torch.tensor([ids[:6]]))[0, -1].argmax())]
    assert harness._loglikelihood_tokens([(None, ids[:6], greedy)])[0][1] is True
    text = " ".join(["the model reads a line"] * 40)
    tokens = harness.tok_encode(text, add_special_tokens=False)
    assert len(tokens) > 2 * who.context
    whole = [who.tokenizer.bos_id, *tokens]
    expected = sum(
        plain(whole[start : start + 1], whole[start + 1 : start + 1 + who.context])
        for start in range(0, len(tokens) // who.context * who.context, who.context)
    )
    left = len(tokens) % who.context
    if left:
        expected += plain(whole[-who.context - 1 : -left], whole[-left:])
    assert harness.loglikelihood_rolling([SimpleNamespace(args=(text,))])[0] == pytest.approx(expected, rel=1e-5)


def test_options_of_a_task_are_followed_or_refused():
    """By the rules of the harness's `hf` models, which sample if `do_sample` or a temperature says so."""
    for options, wanted in (
        ({}, (256, 0, None)),
        ({"temperature": 0.7}, (256, 0.7, None)),
        ({"temperature": 1, "do_sample": False, "top_p": 0.9, "top_k": 5, "max_new_tokens": 7}, (7, 0, None)),
        ({"temperature": 0.5, "do_sample": True, "top_k": 5, "top_p": 1.0, "num_beams": 1}, (256, 0.5, 5)),
        ({"do_sample": False, "until": ["x"], "repetition_penalty": 1.0, "top_k": 0, "seed": None}, (256, 0, None)),
    ):
        found = _generation(options)
        assert (found.tokens, found.temperature, found.top_k) == wanted, options
    for options, message in (
        ({"do_sample": True}, "do_sample=true needs a temperature above 0"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=true needs a temperature above 0"),
        ({"temperature": 0.5, "top_p": 0.95}, "top_p=0.95 in a task's generation_kwargs is not supported"),
        ({"num_beams": 10}, "num_beams=10 in a task's"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 in a task's"),
        ({"an_option_of_the_future": "x"}, "an_option_of_the_future=x in a task's"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            _generation(options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("run", ["tasks=[next_wrod]", f"task_path={TASKS}"], "tasks=next_wrod: no such task"),
        ("run", ["tasks=[next_word]", "task_path=/nowhere"], "task_path=/nowhere: no such directory"),
        ("exported", ["tasks=[next_word]", f"task_path={TASKS}", "backend=torch"], ": applies to runs only"),
    ],
)
def test_mistakes_are_one_line(trained, capsys, monkeypatch, name, arguments, message):
    from lm_eval.tasks import TaskManager

    # listing the harness's own tasks takes seconds
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    capsys.readouterr()
    assert main(["evaluate", str(trained / name), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_files_to_search_are_checked_before_the_model_opens(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.eval.lm_eval.open_scoring_model", lambda *given: pytest.fail("is opened"))
    (tmp_path / "empty.txt").touch()
    words = ["evaluate", str(trained / "run"), "tasks=[next_word]", f"task_path={TASKS}"]
    for file, reason in (("nope.txt", "no such file"), ("empty.txt", "has no text in which to look")):
        assert main([*words, f"corpus={tmp_path / file}"]) == 2
        assert reason in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_one_line(trained, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((trained / "run" / "config.yaml").read_text())
    assert main(["evaluate", str(tmp_path), "tasks=[next_word]", f"task_path={TASKS}"]) == 1
    assert "has no checkpoint yet" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "{", "[]", '{"eos_token": {"id": 3}}', '{"bos_token": "<|bos|>"}'])
def test_a_damaged_tokenizer_is_one_line(trained, tmp_path, capsys, text):
    model = Path(shutil.copytree(trained / "imported", tmp_path / "model"))
    (model / "tokenizer" / "tokenizer_config.json").unlink()
    if text is not None:
        (model / "tokenizer" / "tokenizer_config.json").write_text(text)
    capsys.readouterr()
    assert main(["evaluate", str(model), "tasks=[next_word]", f"task_path={TASKS}"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ("names no eos_token" if text and "bos" in text else "does not say which tokens begin and end") in line


def test_without_the_harness_the_install_line_is_given(trained, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "train.eval.lm_eval")
    capsys.readouterr()
    assert main(["evaluate", str(trained / "run"), "tasks=[next_word]"]) == 2
    assert "pip install 'leviathan[eval]'" in capsys.readouterr().err


@pytest.mark.slow
def test_documents_of_tasks_are_looked_for_in_the_corpus(trained, capsys, monkeypatch):
    """With n-grams of 4 words, one of four questions of `next_word` can be found, and is. Controls: with 13 words none can,
    and of an exported model nothing is searched.
    """

    def beside(model: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["evaluate", str(trained / model), "tasks=[next_word]", f"task_path={TASKS}"]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed[printed.index("{\n") :])["contamination"]["next_word"]

    assert beside("run")["status"].startswith("no question has 13 words")
    monkeypatch.setattr("train.overlap.search.WORDS", 4)
    found = beside("run")
    assert (found["status"], found["ids_found"], found["too_short"]) == ("searched", ["0"], 3)
    assert found["score_found"].keys() >= {"acc,none"} and found["score_found"]["acc,none"] in (0.0, 1.0)
    assert beside("exported")["status"] == "not looked for"
