"""The file for Prometheus, read back by the parsers of Prometheus's own client library."""

from __future__ import annotations

import errno
import json
import math

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_strictly
from prometheus_client.parser import text_string_to_metric_families as parse

from launch.cli import main
from tests.support.tiny import trainer
from train.config import LoggingConfig
from train.metrics import Log, MetricsWriter
from train.report.prometheus import FAMILIES, LOGGED, SLOW, PrometheusFile

SLOW_RANK = {"rank": 3, "kind": "matmuls", "times_the_median": 2.5, "host": 'n"1\\'}
LINE = {
    "step": 40,
    "tokens": 81920,
    "loss": 2.5,
    "mfu": None,
    "peak_memory_bytes": 731103232,
    "aux_loss": [0.25, 0.5],
    "expert_load": [
        {"max_over_mean": 1.5, "entropy": 0.9, "dead": 0},
        {"max_over_mean": 3.0, "entropy": 0.5, "dead": 2},
    ],
    "slow_ranks": [SLOW_RANK],
    "acme_spread": 0.125,
}
HELD_OUT = {"step": 40, "tokens": 81920, "heldout_loss": 3.5, "heldout": {'a/"b"\n\\': {"loss": 3.25, "tokens": 10}}}


def read(text: str) -> dict[tuple[str, ...], float]:
    """Return each sample as (name, label values but the run's) -> value. Both parsers must accept the text, and each
    family must have its help and type, once.
    """
    strict = list(parse_strictly(f"{text}# EOF\n"))
    families = list(parse(text))
    assert [one.name for one in families] == [one.name for one in strict]
    assert len({one.name for one in families}) == len(families)
    found: dict[tuple[str, ...], float] = {}
    for family in families:
        assert family.documentation and family.type == "gauge", family
        assert text.count(f"# TYPE {family.name} ") == text.count(f"# HELP {family.name} ") == 1
        for sample in family.samples:
            labels = dict(sample.labels)
            key = (sample.name, labels.pop("run"), *labels.values())
            assert key not in found, "the same sample twice"
            found[key] = sample.value
    return found


def written(tmp_path, *lines, run="first") -> str:
    settings = LoggingConfig(prometheus=str(tmp_path / "out.prom"))
    (tmp_path / run).mkdir(exist_ok=True)
    writer = MetricsWriter(tmp_path / run / "metrics.jsonl", settings, {}, Log(None), 0)
    for line in lines:
        writer.write(line)
    return (tmp_path / "out.prom").read_text()


def test_the_official_parsers_read_every_number(tmp_path):
    found = read(written(tmp_path, LINE, HELD_OUT))
    assert found.pop((LOGGED.name, "first")) > 1.7e9
    layers = {("0", 1.5, 0.9, 0), ("1", 3.0, 0.5, 2)}
    loads = {("leviathan_expert_load_max_over_mean", "first", layer): load for layer, load, _, _ in layers}
    loads |= {("leviathan_expert_load_entropy_ratio", "first", layer): entropy for layer, _, entropy, _ in layers}
    loads |= {("leviathan_dead_experts", "first", layer): dead for layer, _, _, dead in layers}
    assert found == loads | {
        ("leviathan_step", "first"): 40,
        ("leviathan_tokens", "first"): 81920,
        ("leviathan_loss", "first"): 2.5,
        ("leviathan_heldout_loss", "first"): 3.5,
        ("leviathan_heldout_source_loss", "first", 'a/"b"\n\\'): 3.25,
        ("leviathan_peak_memory_bytes", "first"): 731103232,
        (SLOW.name, "first", "3", 'n"1\\', "matmuls"): 2.5,
        ("leviathan_metric", "first", "aux_loss/0"): 0.25,
        ("leviathan_metric", "first", "aux_loss/1"): 0.5,
        ("leviathan_metric", "first", "acme_spread"): 0.125,
        ("leviathan_metric", "first", 'heldout/a/"b"\n\\/tokens'): 10,
    }


def test_newer_lines_replace_and_slow_ranks_recover(tmp_path):
    numbers = {"loss": math.nan, "gradient_norm": math.inf, "step": 50}
    found = read(written(tmp_path, LINE, HELD_OUT, {**LINE, **numbers, "slow_ranks": []}))
    assert math.isnan(found["leviathan_loss", "first"]) and found["leviathan_gradient_norm", "first"] == math.inf
    assert found["leviathan_step", "first"] == 50 and found["leviathan_heldout_loss", "first"] == 3.5
    assert not any(name == SLOW.name for name, *_ in found)


def test_a_run_may_have_any_name(tmp_path):
    name = 'a "b" \\ {c}\n# d'
    assert read(written(tmp_path, LINE, run=name))["leviathan_loss", name] == 2.5


@pytest.mark.parametrize(
    "old, new",
    [
        ("# TYPE leviathan_loss gauge\n", ""),
        ("# HELP leviathan_loss", "# HELP leviathan loss"),
        ('{run="first"} 2.5', '{run="fir"st"} 2.5'),
        (" 2.5\n", " two\n"),
        ("leviathan_loss{", "leviathan-loss{"),
        ("leviathan_loss{", "leviathan_step{"),
        (r"a/\"b\"", 'a/"b"'),
    ],
)
def test_the_parsers_notice_a_broken_file(tmp_path, old, new):
    text = written(tmp_path, LINE, HELD_OUT)
    assert read(text) and old in text
    with pytest.raises((ValueError, AssertionError, KeyError)):
        read(text.replace(old, new))


def test_families_have_names_of_their_own():
    names = [family.name for family in (*FAMILIES, SLOW, LOGGED)]
    assert len(set(names)) == len(names)


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    """The old file stays until the new one is complete, and the name of what is written meanwhile is not *.prom."""
    before, seen = written(tmp_path, LINE), []
    monkeypatch.setattr("core.files.os.replace", lambda new, old: seen.append((new, old.read_text(), new.read_text())))
    PrometheusFile(tmp_path / "out.prom", "first", print).write([("loss", 1.0)])
    ((new, old, content),) = seen
    assert old == before and read(content)["leviathan_loss", "first"] == 1.0
    assert new.parent == tmp_path and new.suffix != ".prom"
    assert [path.name for path in tmp_path.glob("*.prom")] == ["out.prom"]


def test_a_full_disk_is_logged_once(tmp_path, monkeypatch):
    lines: list[str] = []
    file = PrometheusFile(tmp_path / "out.prom", "first", lines.append)

    def full(path, content):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr("train.report.prometheus.write_text", full)
        for _ in range(3):
            file.write([("loss", 1.0)])
    assert lines == [f"{tmp_path / 'out.prom'}: No space left on device; it keeps older metrics"]
    file.write([("loss", 2.0)])
    assert read((tmp_path / "out.prom").read_text())["leviathan_loss", "first"] == 2.0


@pytest.mark.slow
def test_a_run_writes_it_and_other_ranks_do_not(tmp_path, small_corpus, monkeypatch):
    words = [*small_corpus, "training.steps=2", "logging.every=1", f"logging.prometheus={tmp_path / 'out.prom'}"]
    run = trainer(tmp_path, "run", words)
    assert run.fit() == 0
    found = read((tmp_path / "out.prom").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    newest = [line for line in lines if "loss" in line][-1]
    assert found["leviathan_step", "run"] == 2 and found["leviathan_loss", "run"] == newest["loss"]
    assert found["leviathan_heldout_loss", "run"] == lines[-1]["heldout_loss"]
    logging = next(one for one in run.callbacks if type(one).__name__ == "LoggingCallback")
    monkeypatch.setattr(type(run.world), "is_main", property(lambda _: False))
    (tmp_path / "out.prom").unlink()
    logging.writer = None
    logging.before_training()
    assert logging.writer is None and not (tmp_path / "out.prom").exists()


def test_an_unusable_place_is_refused_first(tmp_path, monkeypatch, capsys, small_corpus):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *small_corpus, "run.root=runs", "run.name=x", "logging.prometheus=metrics.txt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "leviathan: error: logging.prometheus=metrics.txt: must end in .prom"
    assert not (tmp_path / "runs" / "x").exists()
