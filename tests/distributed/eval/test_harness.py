"""The evaluation harness gives the same answers and log-likelihoods through our model class, on one rank and on two,
and through its own `hf` class on the exported model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from parallel.comm.world import connect
from tests.support.hf_models import train_and_export
from train.eval.lm_eval import run_tasks

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: {name}
test_split: test
"""
PAIR = 'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
TASKS = {
    "multiple_choice": PAIR.replace("answer", "right")
    + 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n',
    "loglikelihood": f"{PAIR}metric_list: [{{metric: perplexity, aggregation: perplexity}}, {{metric: acc}}]\n",
    "generate_until": f"{PAIR}generation_kwargs: {{until: [else], max_gen_toks: 9, do_sample: false}}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    "loglikelihood_rolling": 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]\n",
}
WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "line",
    "and",
    "writes",
    "another",
    "def",
    "return",
    "if",
    "else",
    "while",
    "for",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_corpus) -> Path:
    """Return a folder with a short `run` without selection biases, its export `exported`, and `tasks`."""
    root = tmp_path_factory.mktemp("harness")
    train_and_export(root, *small_corpus)
    (root / "tasks").mkdir()
    docs = []
    for i in range(7):
        words = [WORDS[(5 * i + j) % len(WORDS)] for j in range(3 + 2 * i)]
        choices = [" ".join(words[:k]) for k in (1, 2, 3)]
        doc = {"question": " ".join(words), "answer": f" {WORDS[i]}", "choices": choices, "right": i % 3}
        docs.append(json.dumps({**doc, "text": " ".join(words * (1 + 3 * i))}))
    (root / "docs.jsonl").write_text("\n".join(docs))
    for name, more in TASKS.items():
        (root / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, path=root / "docs.jsonl") + more)
    return root


def ours(folder: Path, name: str, out: Path) -> int:
    return run_tasks(folder / name, list(TASKS), connect(), task_path=str(folder / "tasks"), out=str(out), batch_size=2)


def theirs(folder: Path, model: Path, tasks: list[str], **options: Any) -> Any:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        "hf",
        model_args={"pretrained": str(model), "dtype": "float32", **options},
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )


def answers(found: Any) -> dict[str, list[Any]]:
    """Return the texts of each task, or its log-likelihoods and whether the text is the greedy one."""
    docs = {task: sorted(some, key=lambda doc: int(doc["doc_id"])) for task, some in found["samples"].items()}
    return {task: [read(one) for doc in some for one in doc["resps"]] for task, some in docs.items()}


def read(response: Any) -> Any:
    (one,) = response
    if isinstance(one, list | tuple):
        return float(one[0]), str(one[1]) == "True"
    try:
        return float(one), True
    except ValueError:
        return one


def differences(found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> tuple[float, int]:
    """Return the largest difference of log-likelihoods, and the number of other answers that differ."""
    largest, others = 0.0, 0
    for task, right in expected.items():
        assert len(found[task]) == len(right) >= 7
        for one, two in zip(found[task], right, strict=True):
            if isinstance(two, str):
                others += one != two
            else:
                largest, others = max(largest, abs(one[0] - two[0])), others + (one[1] != two[1])
    return largest, others


@pytest.fixture(scope="module")
def reference(folder) -> Any:
    """Return the results of lm-eval's own class.

    In texts without a question (loglikelihood_rolling) it counts a BOS that the tokenizer adds, after the BOS that it
    puts there itself. So the tokenizer adds none there.
    """
    *most, rolling = TASKS
    found = theirs(folder, folder / "exported", most)
    whole = theirs(folder, folder / "exported", [rolling], add_bos_token=False)
    return {key: found[key] | whole[key] for key in ("results", "samples")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "exported"])
@pytest.mark.parametrize("count", [1, 2])
def test_both_classes_of_the_harness_agree(ranks, folder, reference, tmp_path, name, count):
    assert ranks(count, ours, folder, name, tmp_path / "out.json") == [0] * count
    found = json.loads((tmp_path / "out.json").read_text())
    expected = answers(reference)
    assert len({str(one) for some in expected.values() for one in some}) > 30, "the answers differ among each other"
    largest, others = differences(answers(found), expected)
    assert largest < 1e-3 and others == 0
    for task, metrics in reference["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert found["results"][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["a weight", "no BOS"])
def test_another_model_or_tokenizer_is_noticed(folder, reference, tmp_path, change):
    model = Path(shutil.copytree(folder / "exported", tmp_path / "model"))
    if change == "a weight":
        weights = load_file(model / "model.safetensors")
        weights["model.norm.weight"] *= 1.01
        save_file(weights, model / "model.safetensors", {"format": "pt"})
    options = {"add_bos_token": False} if change == "no BOS" else {}
    tasks = ["multiple_choice", "loglikelihood"]
    expected = {task: some for task, some in answers(reference).items() if task in tasks}
    largest, _ = differences(answers(theirs(folder, model, tasks, **options)), expected)
    assert largest > 0.01


@pytest.mark.slow
def test_the_command_divides_tasks_over_two_ranks(folder, command, tmp_path):
    words = ["evaluate", str(folder / "run"), "tasks=[multiple_choice]", f"task_path={folder / 'tasks'}"]
    printed = []
    for ranks in ([], ["launch=torchrun", "launch.processes=2"]):
        done = command(*words, f"out={tmp_path / f'{len(printed)}.json'}", *ranks)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0] == printed[1] and printed[0].count("|multiple_choice") == 1
    one, two = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    largest, others = differences(answers(two), answers(one))
    assert largest < 1e-5 and others == 0
    (tmp_path / "multiple_choice.yaml").write_text(
        TASK.format(name="multiple_choice", path="nothing.jsonl") + TASKS["multiple_choice"]
    )
    done = command(*words[:-1], f"task_path={tmp_path}", "launch=torchrun", "launch.processes=2", timeout_s=120)
    assert done.returncode == 1 and done.stderr.count("a task's data cannot be read: Unable to find") == 1
