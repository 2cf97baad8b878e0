"""Models that only transformers knows: `evaluate` asks them as it asks ours, and reads nothing but safetensors."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from launch.cli import main
from tests.support import hf_models
from train.eval.config import GenerateConfig
from train.eval.generate import Continuation
from train.eval.open_model import is_ours
from train.eval.scoring_model import from_transformers
from train.exam.pictures import SceneQuestions, black_picture

QUESTION = {"id": "1", "question": "Which?", "choices": ["11", "22"], "answer": 0}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """Return a directory with a random GPT-2 of 96 positions and a tokenizer of 300 ids."""
    return hf_models.save_gpt2(tmp_path_factory.mktemp("foreign") / "gpt2", positions=96)


def suite(folder: Path, *records: object) -> list[str]:
    (folder / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    mine = f"{{exam: multiple_choice, options: {{path: '{folder / 'q.jsonl'}'}}}}"
    scenes = "{exam: scenes, options: {number: 2, thing: pencil}}"
    return ["suite=own", f"+suite.exams.mine={mine}", f"+suite.exams.pencils={scenes}"]


@torch.no_grad()
def test_a_suite_is_asked_of_a_model_of_transformers(gpt2, tmp_path, capsys):
    """The answer is that of a plain loop. What does not fit and pictures are not asked, and the rest goes on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    long = {"id": "2", "question": "a " * 200, "choices": ["11", "22"], "answer": 0}
    words = suite(tmp_path, QUESTION, long)
    assert main(["evaluate", str(gpt2), *words, f"out={tmp_path / 'out.json'}"]) == 0
    shown, kept = json.loads(capsys.readouterr().out), json.loads((tmp_path / "out.json").read_text())
    answers = kept["exams"]["mine"]["answers"]
    assert [one["outcome"] == "not_asked" for one in answers] == [False, True]
    assert answers[1]["note"].endswith("tokens, but the model's context is 96")
    assert shown["exams"]["mine"]["not_asked"].startswith("1 of 2 questions, it takes ")
    assert shown["exams"]["pencils"]["score"] is None
    assert shown["exams"]["pencils"]["not_asked"].startswith("2 of 2 questions, the model has no encoder")

    library, model = AutoTokenizer.from_pretrained(gpt2), AutoModelForCausalLM.from_pretrained(gpt2)
    ids = [0, *library("Which?\nA. 11\nB. 22\nAnswer:")["input_ids"]]
    begin = len(ids)
    while len(ids) < begin + 24 and (not ids[begin:] or (ids[-1] != 1 and "\n" not in library.decode(ids[begin:]))):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    plain = library.decode(ids[begin:], skip_special_tokens=True).partition("\n")[0]
    assert answers[0]["answer"] == plain != ""


@torch.no_grad()
def test_the_loss_of_a_text_is_that_of_the_models_logits(gpt2, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "a.txt").write_text("The model reads a line.")
    assert main(["evaluate", str(gpt2), f"text={tmp_path / 'a.txt'}"]) == 0
    found = json.loads(capsys.readouterr().out)
    ids = [0, *AutoTokenizer.from_pretrained(gpt2)("The model reads a line.")["input_ids"]]
    logits = AutoModelForCausalLM.from_pretrained(gpt2)(torch.tensor([ids[:-1]])).logits[0]
    loss = float(cross_entropy(logits, torch.tensor(ids[1:])))
    assert found["loss"] == pytest.approx(loss, rel=1e-5) and found["tokens"] == len(ids) - 1
    assert found["bits_per_byte"] == pytest.approx(loss * (len(ids) - 1) / 23 / math.log(2), rel=1e-5)


@pytest.mark.slow
def test_tasks_of_the_harness_are_asked_too(gpt2, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"q": "The sky is", "choices": [" blue", " red"], "answer": 0}))
    (tmp_path / "sky.yaml").write_text(
        f"task: sky\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}}}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{answer}}"\n'
        'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]\n'
    )
    out = tmp_path / "out.json"
    assert main(["evaluate", str(gpt2), "tasks=[sky]", f"task_path={tmp_path}", f"out={out}"]) == 0
    assert json.loads(out.read_text())["results"]["sky"]["acc,none"] in (0, 1)


def test_a_foreign_model_that_cannot_be_used_is_one_line(gpt2, tmp_path, refused):
    """Control: the same directory above."""
    copies = {name: Path(shutil.copytree(gpt2, tmp_path / name)) for name in ("pickled", "code", "adapter", "other")}
    (copies["pickled"] / "model.safetensors").unlink()
    torch.save({}, copies["pickled"] / "pytorch_model.bin")
    (copies["adapter"] / "adapter_config.json").write_text("{}")
    for name, change in {
        "code": {"model_type": "mine", "auto_map": {"AutoConfig": "c.Config", "AutoModelForCausalLM": "c.Model"}},
        "other": {"model_type": "nothing"},
    }.items():
        config = json.loads((copies[name] / "config.json").read_text()) | change
        (copies[name] / "config.json").write_text(json.dumps(config))
    (copies["code"] / "c.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name, folder in copies.items():
        line = refused("evaluate", str(folder), *suite(tmp_path, QUESTION))
        assert line.startswith("run=") and ("adapter" if name == "adapter" else "transformers cannot open it") in line
    assert not (tmp_path / "ran").exists() and not is_ours(gpt2)
    pencils = "+suite.exams.pencils={exam: scenes, options: {number: 2}}"
    line = refused("evaluate", str(gpt2), "suite=own", pencils)
    assert line.startswith("suite=own: nothing of it can be asked; pencils: 2 of 2 questions, the model has no encoder")
    assert "no such" not in line


def test_our_architectures_are_computed_by_us(tmp_path):
    for kind, ours in {"llama": True, "llama4": True, "gpt2": False, None: True}.items():
        (tmp_path / "config.json").write_text(json.dumps({} if kind is None else {"model_type": kind}))
        assert is_ours(tmp_path) == ours
    (tmp_path / "config.json").write_text("{")
    assert is_ours(tmp_path), "opening it says what is damaged"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_keys_and_values_of_transformers_change_no_token(gpt2, tmp_path, kind, monkeypatch):
    """The model computes each new token alone."""
    folder = gpt2
    if kind == "llama":
        hf_models.byte_tokenizer(tmp_path)
        folder = hf_models.save(hf_models.make("llama", vocab_size=300, bos_token_id=0, eos_token_id=1), tmp_path)
    model, lengths = from_transformers(str(folder), torch.device("cpu")), list[int]()
    forward = model.network.forward

    def counted(*args, **more):
        lengths.append(more["input_ids"].shape[1])
        return forward(*args, **more)

    monkeypatch.setattr(model.network, "forward", counted)
    config = GenerateConfig(run="", tokens=20, temperature=0.0, top_k=None)
    prompts = [[0, *model.tokenizer.encode([text])[0]] for text in ("the model", "a line and another")]
    found = []
    for one in (model, replace(model, begin=None)):
        asked = [Continuation(prompt, config) for prompt in prompts]
        one.continue_all(asked, 2)
        found.append([asked_.found for asked_ in asked])
    assert found[0] == found[1] != [[], []]
    steps = len(lengths) // 2
    assert lengths[:steps].count(1) == steps - 2 and 1 not in lengths[steps:]

    assert model.begin is not None
    whole, next_logits = model.logits(torch.tensor([prompts[0]]))[0, -1], model.begin()
    next_logits(prompts[0][:-2])
    assert torch.allclose(next_logits(prompts[0]), whole, atol=1e-5), "several tokens at once"
    assert not torch.allclose(model.begin()(prompts[0][-1:]), whole, atol=1e-5), "control: the last token alone"


@torch.no_grad()
def test_a_model_of_transformers_with_an_encoder_sees_pictures(tmp_path, capsys):
    """Each answer is that of a plain loop over the whole model. Control: most change with the picture."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = hf_models.save_llava(tmp_path / "llava", positions=64)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 9.0, "do_sample": True}))
    scenes = "+suite.exams.pencils={exam: scenes, options: {number: 3, thing: pencil}}"
    assert main(["evaluate", str(folder), "suite=own", scenes, f"out={tmp_path / 'out.json'}"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())["exams"]["pencils"]
    assert result["not_asked"] is None and result["controls"]["black_picture"]["not_asked"] is None

    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)

    def plain(prompt: str, picture: bytes) -> str:
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        inputs = processor(text=prompt, images=[image], return_tensors="pt")
        ids, begin = inputs["input_ids"], inputs["input_ids"].shape[1]
        while ids.shape[1] < begin + 8 and "\n" not in (text := processor.decode(ids[0, begin:])):
            pixels = inputs["pixel_values"]
            token = model(input_ids=ids, pixel_values=pixels).logits[0, -1].argmax()
            if token == 1:
                break
            ids = torch.cat([ids, token[None, None]], 1)
        text = processor.decode(ids[0, begin:], skip_special_tokens=True)
        return text.partition("\n")[0]

    questions = SceneQuestions(3, thing="pencil").questions()
    expected = [plain(one.prompt, one.pictures[0]) for one in questions]
    assert [one["answer"] for one in result["answers"]] == expected
    black = [plain(one.prompt, black_picture(112)) for one in questions]
    assert sum(a != b for a, b in zip(expected, black, strict=True)) > 1, "control"

    (folder / "processor_config.json").write_text("{")
    assert main(["evaluate", str(folder), "suite=own", scenes]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "error" in one]
    assert "can be asked; pencils: 3 of 3 questions, transformers cannot open its processor of pictures: " in line
