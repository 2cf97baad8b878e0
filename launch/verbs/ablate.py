"""`leviathan filter ablate`: does filtering help? Equal tokens of filtered, random and length-chosen halves, and all.

Every arm trains the same model for the same steps from the same initial weights, seed by seed. What is compared is the
held-out loss, which no filter touches, in thirds of its rows by difficulty: the loss of a row under the n-gram model of
all training text. Differences are taken seed by seed against a random half, another one for each seed: the intervals
cover the lot as well as the run.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from core.config import load, plain
from core.errors import ConfigError
from core.files import write_bytes, write_json, write_text
from core.html import data_url, page
from data.filter.config import FilterRules, ScorerConfig, ScorerKind
from data.filter.corpus import SourcePart
from data.filter.input.records import Record
from data.filter.score.ngram import NgramScorer
from data.sources import make_source
from launch.local import train
from parallel.comm.world import connect
from train.checkpoint.restore import RestoredRun, restore
from train.config import TrainConfig
from train.eval.sequence_loss import row_losses

THIRDS = ("easy third", "middle third", "hard third")
QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t, two-sided 95%, by the number of seeds."""
AGAINST = "random half"
COLOURS = {"filtered": "#0072B2", "random half": "#999999", "longest half": "#E69F00", "everything": "#009E73"}

Losses = dict[str, list[list[float]]]
"""By arm: for each seed the mean held-out loss of each third, then of all rows."""


@dataclass(frozen=True)
class AblateConfig:
    """`train`: overrides of `leviathan train`, such as experiment=smoke. `sequences`: held-out rows of each source."""

    seeds: int = 3
    steps: int = 200
    sequences: int = 64
    train: list[str] = field(default_factory=lambda: ["experiment=smoke"])

    def __post_init__(self) -> None:
        if not 2 <= self.seeds <= max(QUANTILE):
            raise ConfigError("seeds", self.seeds, "error bars need from 2 to 8 of them", [3, 5])
        for key in ("steps", "sequences"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "must be positive")


def ablate(config: AblateConfig, rules: FilterRules, out: Path) -> int:
    """Train, compare, and write `ablation.json`, `.png` and `.html` into `out`. Runs that are done stay as they are."""
    found: Losses = {arm: [] for arm in COLOURS}
    difficulty: NDArray[np.float64] | None = None
    for seed in range(config.seeds):
        for arm, filter_ in arms(rules, seed).items():
            name = f"{arm.replace(' ', '-')}-{seed}"
            code = train([_run(config, filter_, out / "runs", name, seed)])
            if code:
                return code
            restored = restore(out / "runs" / name, connect())
            if difficulty is None:  # of the same rows for every arm: no filter touches them
                difficulty = held_out_difficulty(restored, config.sequences)
            found[arm].append(thirds(held_out_losses(restored, config.sequences), difficulty))
            shown = ", ".join(f"{value:.4f}" for value in found[arm][-1])
            print(f"ablate: {arm}, seed {seed}: held-out loss by thirds and of all rows {shown}", flush=True)
    write(found, config, rules, out)
    return 0


def arms(rules: FilterRules, seed: int) -> Mapping[str, FilterRules | None]:
    """What each arm of a seed is trained on. The controls have the filter's gates, so that only the choice differs."""
    drawn = replace(_scored_by(rules, ScorerKind.random), seed=rules.seed + seed)
    by = {"filtered": rules, "random half": drawn}
    return {**by, "longest half": _scored_by(rules, ScorerKind.length), "everything": None}


def _scored_by(rules: FilterRules, kind: ScorerKind) -> FilterRules:
    """In one length bucket: length chosen inside buckets of length would be no choice by length."""
    return replace(rules, scorer=ScorerConfig(kind=kind), select=replace(rules.select, length_buckets=1))


def _run(config: AblateConfig, filter_: FilterRules | None, root: Path, name: str, seed: int) -> TrainConfig:
    usual = [f"training.steps={config.steps}", f"run.seed={seed}", "evaluation.every=0", "checkpoint.every=0"]
    loaded = load("train", TrainConfig, [*config.train, *usual, "logging.report=false", "evaluation.baselines=false"])
    run = replace(loaded.run, root=str(root), name=name)
    return replace(loaded, run=run, data=replace(loaded.data, filter=filter_))


def _rows(restored: RestoredRun, rows: int) -> Iterator[tuple[str, int]]:
    """Each source that has held-out rows, and how many of them are looked at."""
    loader = restored.loader()
    counts = ((source, min(rows, loader.num_held_out(source))) for source in restored.corpus.sources)
    return ((source, count) for source, count in counts if count)


def held_out_difficulty(restored: RestoredRun, rows: int) -> NDArray[np.float64]:
    """Of each held-out row its loss under the n-gram model of all training text."""
    loader, tokenizer, data = restored.loader(), restored.corpus.tokenizer, restored.config.data
    scorer, records = NgramScorer(), []
    parts = [SourcePart(make_source(name, part, data), name) for name, part in data.sources.items()]
    scorer.fit(lambda: (one for part in parts for one in part.records() if isinstance(one, Record)))
    for source, count in _rows(restored, rows):
        texts = [tokenizer.decode(ids) for ids in loader.held_out(source, 0, count).tokens_BT.tolist()]
        records += [Record(f"{source}:{row}", source, source, text) for row, text in enumerate(texts)]
    return scorer.score(records)


def held_out_losses(restored: RestoredRun, rows: int) -> NDArray[np.float64]:
    """The model's loss of each held-out row; sources count by their rows."""
    loader = restored.loader()
    losses = [
        row_losses(restored.placed, partial(loader.held_out, source), count, restored.phase.micro_batch_size)
        for source, count in _rows(restored, rows)
    ]
    return torch.cat(losses).cpu().numpy()


def thirds(losses: NDArray[np.float64], difficulty: NDArray[np.float64]) -> list[float]:
    """Mean loss of the easiest, the middle and the hardest third of the rows, and of all."""
    order = np.argsort(difficulty, kind="stable")
    return [float(losses[part].mean()) for part in (*np.array_split(order, 3), order)]


def difference(found: Losses, arm: str, place: int) -> tuple[float, float]:
    """Mean over seeds of the loss of `arm` less that of the random half, and the half width of its 95% interval."""
    pairs = zip(found[arm], found[AGAINST], strict=True)
    values = [one[place] - other[place] for one, other in pairs]
    return statistics.mean(values), QUANTILE[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def write(found: Losses, config: AblateConfig, rules: FilterRules, out: Path) -> None:
    table = {
        arm: {
            third: dict(zip(("difference", "half_width"), difference(found, arm, place), strict=True))
            for place, third in enumerate((*THIRDS, "all rows"))
        }
        for arm in found
        if arm != AGAINST
    }
    write_json(
        out / "ablation.json",
        {"losses": found, f"against {AGAINST}": table, "ablate": plain(config), "rules": plain(rules)},
    )
    picture = draw(found)
    write_bytes(out / "ablation.png", picture)
    lines = "".join(
        f"<tr><td>{arm}</td>"
        + "".join(f"<td class=n>{one['difference']:+.4f} ± {one['half_width']:.4f}</td>" for one in row.values())
        + "</tr>"
        for arm, row in table.items()
    )
    head = "".join(f"<th>{third}</th>" for third in (*THIRDS, "all rows"))
    body = (
        f"<h1>Does filtering help?</h1><p>Held-out loss less that of the {AGAINST}, nats per token, at equal tokens: "
        f"{config.seeds} paired seeds, {config.steps} steps; ± is half of the 95% interval. Below zero is better.</p>"
        f"<table><tr><th></th>{head}</tr>{lines}</table><img alt='differences' src='{data_url(picture)}'>"
    )
    write_text(out / "ablation.html", page("Does filtering help?", body))
    for arm, row in table.items():
        shown = ", ".join(f"{third} {one['difference']:+.4f} ± {one['half_width']:.4f}" for third, one in row.items())
        print(f"{arm} less {AGAINST}: {shown}")
    print(f"ablation: {out / 'ablation.html'}")


def draw(found: Losses) -> bytes:
    """Differences against the random half with their intervals, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots()
    places: Sequence[str] = (*THIRDS, "all rows")
    for number, arm in enumerate(arm for arm in found if arm != AGAINST):
        values = [difference(found, arm, place) for place in range(len(places))]
        x = np.arange(len(places)) + (number - 1) * 0.18
        means, widths = zip(*values, strict=True)
        axes.errorbar(x, means, widths, fmt="o", capsize=4, color=COLOURS[arm], label=arm)
    axes.axhline(0, color=COLOURS[AGAINST], linewidth=1)
    axes.set_xticks(range(len(places)), places)
    axes.set_ylabel(f"held-out loss less that of the {AGAINST}\nnats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    sink = io.BytesIO()
    FigureCanvasAgg(figure).print_png(sink)
    return sink.getvalue()
