"""Questions about pictures: our model class, on one rank and on two, against lm-eval's `hf-multimodal` class on the
exported model.

That class refuses log-likelihoods of questions with pictures (lm-eval 0.4.13), so these come from its own model and
processor. transformers' picture processor of Llama 4 needs torchvision. Without it, tiles are cut by our code, which
`tests/data/images` compares with transformers'; the tokens are those of transformers' processor all the same.
"""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.images.canvas import TileConfig
from data.images.tiles import GREYS, tiles
from parallel.comm.world import connect
from tests.support.hf_models import train_and_export
from tests.support.mixed import TINY_PICTURES, png
from train.eval.lm_eval import run_tasks

CHOICES, NEW_TOKENS = [" 1", " 2", " red"], 5
TASK = """task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
doc_to_image: [first, second]
doc_to_text: "{{{{question}}}}"
"""
CHOOSE = f"output_type: multiple_choice\ndoc_to_choice: {json.dumps(CHOICES)}\ndoc_to_target: 0\ntarget_delimiter: ''\n"
SAY = f"output_type: generate_until\ndoc_to_target: '1'\ngeneration_kwargs: {{max_gen_toks: {NEW_TOKENS}}}\n"
QUESTIONS = ["<image>How many<image>boxes?", "first <image> second <image>What colour?", "<image><image>word"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a short `run` on pictures, its export `exported`, and tasks."""
    import datasets

    root = tmp_path_factory.mktemp("pictures")
    data = ["data=files", "data.tokenizer.vocab_size=300", "data.held_out=0.2", f"data.cache={root / 'cache'}"]
    train_and_export(root, *TINY_PICTURES, "~data.sources.text", *data)
    pictures = [[png(3 * i + j, (16, 8)[(i + j) % 2], 8) for i in range(len(QUESTIONS))] for j in range(2)]
    columns = {"question": QUESTIONS, "first": pictures[0], "second": pictures[1]}
    features = {"question": datasets.Value("string"), "first": datasets.Image(), "second": datasets.Image()}
    rows = {key: [{"bytes": v} if isinstance(v, bytes) else v for v in values] for key, values in columns.items()}
    path = root / "docs.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    (root / "tasks").mkdir()
    for name, more in {"choose": f"{CHOOSE}metric_list: [{{metric: acc}}]\n", "say": SAY}.items():
        (root / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, path=path) + more)
    return root


def ours(folder: Path, out: Path) -> int:
    return run_tasks(
        folder / "run", ["choose", "say"], connect(), task_path=str(folder / "tasks"), out=str(out), batch_size=2
    )


def processor_of_our_tiles(folder: str, **ignored: Any) -> Any:
    """Return transformers' processor of Llama 4 with tiles cut by our code."""
    import transformers
    from transformers.image_processing_utils import BaseImageProcessor

    class TilesOfOurs(BaseImageProcessor):
        def __call__(self, images: Any, **options: Any) -> Any:
            config, found = TileConfig(8, 2, 4), []
            flat = [one for part in images for one in (part if isinstance(part, list) else [part])]
            for picture in flat:
                canvas, pixels_N3SS = tiles(picture.convert("RGB"), config)
                found.append((torch.tensor(GREYS)[torch.from_numpy(pixels_N3SS).int()], [canvas.rows, canvas.columns]))
            data = {"pixel_values": torch.cat([one for one, _ in found]), "aspect_ratios": [grid for _, grid in found]}
            return transformers.BatchFeature(data)

    settings = json.loads((Path(folder) / "processor_config.json").read_text())
    settings.pop("processor_class")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.Llama4Processor(TilesOfOurs(), tokenizer, **settings)


@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    """Return lm-eval's own class with the exported model."""
    import transformers
    from lm_eval.models.hf_vlms import HFMultimodalLM

    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            patch.setattr(transformers.AutoProcessor, "from_pretrained", processor_of_our_tiles)
        return HFMultimodalLM(
            str(folder / "exported"), image_string="<|image|>", dtype="float32", device="cpu", max_length=64
        )


def log_likelihoods(theirs: Any, text: str, pictures: list[Any], shown: float = 1.0) -> list[float]:
    """Return the log-probability of each choice after a question. `shown`: a factor of the pixels."""
    found = []
    for choice in CHOICES:
        context = text.replace("<image>", theirs.image_token)
        before, after, _ = theirs._encode_multimodal_pair(context, choice, pictures)
        given = theirs.processor(text=context + choice, images=pictures, return_tensors="pt")
        assert given["input_ids"][0].tolist() == [*before, *after]
        with torch.no_grad():
            logits_TV = theirs.model(given["input_ids"], pixel_values=shown * given["pixel_values"].float()).logits[0]
        logp_TV = logits_TV.log_softmax(-1)[len(before) - 1 : -1]
        found.append(float(logp_TV.gather(1, torch.tensor(after)[:, None]).sum()))
    return found


def pictures_of(folder: Path) -> list[list[Any]]:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(folder / "docs.parquet").to_pylist()
    return [[Image.open(io.BytesIO(row[name]["bytes"])) for name in ("first", "second")] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_both_classes_of_the_harness_agree(ranks, folder, theirs, tmp_path, count):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    assert ranks(count, ours, folder, tmp_path / "out.json") == [0] * count
    found = json.loads((tmp_path / "out.json").read_text())["samples"]
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    said: Any = simple_evaluate(theirs, tasks=["say"], task_manager=manager, bootstrap_iters=0)
    texts = [[sample["resps"][0][0] for sample in some["say"]] for some in (found, said["samples"])]
    assert texts[0] == texts[1] and all(texts[0])
    for text, pictures, sample in zip(QUESTIONS, pictures_of(folder), found["choose"], strict=True):
        expected = log_likelihoods(theirs, text, pictures)
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(expected, abs=1e-3)
        other = log_likelihoods(theirs, text, pictures, shown=-1.0)
        assert max(abs(a - b) for a, b in zip(other, expected, strict=True)) > 1e-2, "control: other pixels"
