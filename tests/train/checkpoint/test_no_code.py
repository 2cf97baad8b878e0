"""Code planted in a run directory is never executed, whichever file holds it and whichever verb reads it.

An audit hook notes the files that each verb opens. Payloads are then put into each file in turn, and its verbs run.
A payload that is unpickled, or loaded as YAML with tags, makes a file.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml

from launch.cli import main
from tests.support.filtering import prose, two_sources, write_lines
from tests.support.tiny import TINY

BESIDE = (".metadata", "__0_0.distcp", "pytorch_model.bin", "optimizer.pt", "callbacks.pkl", "tokenizer.pkl", "x.npy")
"""Names of files that other programs, or older versions of this one, unpickle. The run has each of them."""
READERS = ("resume", "export", "report")
"""Verbs that read runs in different ways. All other verbs share their code; the slow test runs all verbs."""
_opened: list[set[str]] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened and event == "open":
        _opened[-1].add(str(arguments[0]))


sys.addaudithook(_note)  # it cannot be removed, but acts only while `_opened` has a set


class Payload:
    def __init__(self, fired: Path) -> None:
        self.fired = fired

    def __reduce__(self) -> Any:
        return open, (str(self.fired), "w")


class Run:
    """A run on filtered data, with its corpus cache. `restore` resets the files of both."""

    def __init__(self, root: Path) -> None:
        self.root, self.place, self.kept = root, root / "place", root / "kept"
        self.fired, self.out = root / "fired", root / "out"
        folder = two_sources(root)["prose"]["path"]
        self.line = [*TINY, "data=files", f"data.sources.text.path={folder}", f"data.cache={self.place / 'cache'}"]
        self.line += ["data.tokenizer.vocab_size=300", "data.held_out=0.2", "+data.filter={keep: 0.5, unit: documents}"]
        self.line += ["training.steps=2", "training.seq_len=24", "model.num_layers=2", "model.attention_chunk_size=8"]
        self.line += ["checkpoint.every=1", "logging.report=false", f"run.root={self.place}"]
        assert main(["train", *self.line, "run.name=run"]) == 0
        torch.save({"model": Payload(self.fired)}, root / "archive")
        self.payloads = {
            "pickle": pickle.dumps(Payload(self.fired)),
            "torch": (root / "archive").read_bytes(),
            "yaml": f"model: !!python/object/apply:builtins.open ['{self.fired}', 'w']\n".encode(),
        }
        for folder in (self.directory, *self.directory.glob("checkpoints/step-*")):
            for number, name in enumerate(BESIDE):
                (folder / name).write_bytes(self.payloads["torch" if number % 2 else "pickle"])
        shutil.copytree(self.place, self.kept)
        (scores,) = self.place.glob("cache/tokens/*/scores.parquet")
        self.record = next(row["id"] for row in pyarrow.parquet.read_table(scores).to_pylist() if row["kept"])
        self.records = write_lines(root / "records.jsonl", prose(40, seed=7))

    @property
    def directory(self) -> Path:
        return self.place / "run"

    def restore(self) -> None:
        for folder in (self.place, self.out):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.kept, self.place)

    def verbs(self) -> dict[str, list[str]]:
        run, out = str(self.directory), str(self.out)
        scorer = ["scorer.kind=loss", f"scorer.model={run}", "keep=0.5", "unit=documents"]
        return {
            "resume": ["train", *self.line, "run.name=run"],
            "init_from": ["train", *self.line, "run.name=other", "training.steps=1", f"model.init_from={run}"],
            "evaluate": ["evaluate", run],
            "generate": ["generate", run, "tokens=2"],
            "export": ["export", run, out, "drop_selection_bias=true", "check=never"],
            "report": ["report", run],
            "explain": ["filter", f"explain={self.record}", f"run={run}"],
            "scorer": ["filter", f"input={self.records}", f"out={out}", *scorer],
            "import": ["import", run, out],
        }

    def call(self, arguments: list[str]) -> int | None:
        """Return the exit code, or None after an exception."""
        shutil.rmtree(self.out, ignore_errors=True)
        try:
            return main(arguments)
        except Exception:
            return None

    def assert_not_executed(self, name: str, kind: str, verbs: list[str]) -> None:
        """Put a payload into a file, call the verbs and check that it was not executed."""
        for verb in verbs:
            self.restore()
            (self.place / name).write_bytes(self.payloads[kind])
            self.call(self.verbs()[verb])
            assert not self.fired.exists(), f"{verb} executed what was planted in {name}"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def opened(run) -> dict[str, list[str]]:
    """Return the files of the run and its cache, with the verbs that open them."""
    found: dict[str, list[str]] = {}
    for verb, arguments in run.verbs().items():
        run.restore()
        _opened.append(set())
        try:
            code = run.call(arguments)
        finally:
            names = _opened.pop()
        assert not run.fired.exists(), f"{verb} executed a file beside the run's own"
        assert code == 0 or verb == "import", verb
        for name in sorted(names):
            path = Path(name)
            if path.is_relative_to(run.place) and (run.kept / path.relative_to(run.place)).is_file():
                found.setdefault(str(path.relative_to(run.place)), []).append(verb)
    run.restore()
    return found


def test_the_payloads_do_fire(run):
    """Control: readers that the package must not use execute the payloads."""
    readers = {
        "pickle": pickle.loads,
        "yaml": yaml.unsafe_load,
        "torch": lambda content: torch.load(run.root / "archive", weights_only=False),
    }
    for kind, read in readers.items():
        assert not run.fired.exists()
        with contextlib.suppress(TypeError):
            read(run.payloads[kind])
        assert run.fired.exists(), kind
        run.fired.unlink()


def test_the_verbs_open_what_they_are_meant_to(opened):
    """Otherwise the tests below would test nothing."""
    checkpoint = "run/checkpoints/step-00000002"
    for name, verbs in {
        f"{checkpoint}/index.json": {"resume", "init_from", "evaluate", "generate", "export", "scorer"},
        f"{checkpoint}/rank_0.bin": {"resume", "init_from", "evaluate", "generate", "export", "scorer"},
        "run/config.yaml": {"resume", "init_from", "evaluate", "generate", "export", "scorer", "report", "explain"},
        "run/metrics.jsonl": {"report", "explain"},
        "run/summary.json": {"report"},
    }.items():
        assert verbs <= set(opened[name]), name


def test_nothing_planted_is_executed(run, opened):
    """All verbs read a planted configuration, `READERS` the other files of the run, and one verb the cache."""
    for name, verbs in opened.items():
        few = [verb for verb in verbs if verb in READERS and verb != "resume"][:1]
        chosen = [verb for verb in verbs if verb in READERS] if name.startswith("run/") else few
        for kind in {".yaml": ("yaml", "pickle"), ".bin": ("torch",)}.get(Path(name).suffix, ("pickle",)):
            run.assert_not_executed(name, kind, verbs if name.endswith(".yaml") else chosen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pickle", "torch", "yaml"])
def test_nothing_planted_is_executed_by_any_verb(run, opened, kind):
    for name, verbs in opened.items():
        run.assert_not_executed(name, kind, verbs)


@pytest.mark.parametrize("kind", ["pickle", "yaml"])
def test_certify_does_not_execute_a_configuration(run, kind):
    run.restore()
    (run.directory / "config.yaml").write_bytes(run.payloads[kind])
    assert run.call(["certify", f"run={run.directory}"]) == 2
    assert not run.fired.exists()
