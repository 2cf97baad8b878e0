"""`leviathan filter ablate`: measure whether filtering helps.

The arms train on the filtered data, a random half, the longest half and all data. "Half" means the fraction `keep`.
For each seed, all arms start from the same weights and train for equally many steps and tokens. They are compared by
loss on held-out sequences, which no filter changes, in thirds by difficulty. The difficulty of a sequence is its loss
under the n-gram model of all training text. The loss of the random half with the same seed is subtracted from that of
each other arm. Each seed draws another random half, so the confidence intervals include the variance of the draw.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.config import load, plain
from core.files import write_bytes, write_json, write_text
from core.html import data_url, page
from data.filter.audit.plots import picture
from data.filter.config import FilterRules, ScorerConfig, ScorerKind
from data.filter.corpus import SourcePart
from data.filter.input.records import Record
from data.filter.score.ngram import NgramScorer
from data.sources import make_source
from launch.filter.config import AblateConfig
from launch.local import train
from parallel.comm.world import connect
from train.checkpoint.restore import RestoredRun, restore
from train.config import TrainConfig
from train.eval.contamination import MODELS
from train.eval.held_out import sequence_losses

GROUPS = ("easy third", "middle third", "hard third", "all sequences")
QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Two-sided 95% quantile of Student's t distribution, by the number of seeds."""
CONTROL = "random half"
COLOURS = {"filtered": "#0072B2", CONTROL: "#999999", "longest half": "#E69F00", "everything": "#009E73"}

Losses = dict[str, list[list[float]]]
"""For each arm and seed, the mean held-out loss of each of `GROUPS`."""


def ablate(config: AblateConfig, rules: FilterRules, out: Path) -> int:
    """Train and compare the arms; write `ablation.json`, `.png` and `.html` into `out`. Skips finished runs."""
    found: Losses = {arm: [] for arm in COLOURS}
    difficulty: NDArray[np.float64] | None = None
    for seed in range(config.seeds):
        for arm, filter_ in arms(rules, seed).items():
            name = f"{arm.replace(' ', '-')}-{seed}"
            code = train([_run(config, filter_, out / "runs", name, seed)])
            if code:
                return code
            restored = restore(out / "runs" / name, connect(), models=MODELS)
            if difficulty is None:  # all arms have the same held-out sequences
                difficulty = held_out_difficulty(restored, config.sequences)
            found[arm].append(group_means(held_out_losses(restored, config.sequences), difficulty))
            shown = ", ".join(f"{value:.4f}" for value in found[arm][-1])
            print(f"ablate: {arm}, seed {seed}: held-out loss of each third and of all sequences {shown}", flush=True)
    write(found, config, rules, out)
    return 0


def arms(rules: FilterRules, seed: int) -> Mapping[str, FilterRules | None]:
    """Return the filter of each arm. All filters have the same gates, so that only the selection differs."""
    # one length bucket, since a selection within buckets could not choose the longest records
    control = replace(rules, select=replace(rules.select, length_buckets=1))
    random = replace(control, scorer=ScorerConfig(kind=ScorerKind.random), seed=rules.seed + seed)
    longest = replace(control, scorer=ScorerConfig(kind=ScorerKind.length))
    return {"filtered": rules, CONTROL: random, "longest half": longest, "everything": None}


def _run(config: AblateConfig, filter_: FilterRules | None, root: Path, name: str, seed: int) -> TrainConfig:
    usual = [f"training.steps={config.steps}", f"run.seed={seed}", "evaluation.every=0", "checkpoint.every=0"]
    loaded = load("train", TrainConfig, [*config.train, *usual, "logging.report=false", "evaluation.baselines=false"])
    run = replace(loaded.run, root=str(root), name=name)
    return replace(loaded, run=run, data=replace(loaded.data, filter=filter_))


def _counts(restored: RestoredRun, most: int) -> Iterator[tuple[str, int]]:
    """Yield each source with held-out sequences, and the number of them to use, at most `most`."""
    loader = restored.loader()
    counts = ((source, min(most, loader.num_held_out(source))) for source in restored.corpus.sources)
    return ((source, count) for source, count in counts if count)


def held_out_difficulty(restored: RestoredRun, most: int) -> NDArray[np.float64]:
    """Return the loss of each held-out sequence under the n-gram model of all training text."""
    loader, tokenizer, data = restored.loader(), restored.corpus.tokenizer, restored.config.data
    scorer, records = NgramScorer(), []
    parts = [SourcePart(make_source(name, part, data), name) for name, part in data.sources.items()]
    scorer.fit(lambda: (one for part in parts for one in part.records() if isinstance(one, Record)))
    for source, count in _counts(restored, most):
        texts = [tokenizer.decode(ids) for ids in loader.held_out(source, 0, count).tokens_BT.tolist()]
        records += [Record(f"{source}:{place}", source, source, text) for place, text in enumerate(texts)]
    return scorer.score(records)


def held_out_losses(restored: RestoredRun, most: int) -> NDArray[np.float64]:
    """Return the model's loss on each held-out sequence."""
    loader = restored.loader()
    losses = [
        sequence_losses(restored.placed, partial(loader.held_out, source), count, restored.phase.micro_batch_size)
        for source, count in _counts(restored, most)
    ]
    return torch.cat(losses).cpu().numpy()


def group_means(losses: NDArray[np.float64], difficulty: NDArray[np.float64]) -> list[float]:
    """Return the mean loss of each of `GROUPS`."""
    order = np.argsort(difficulty, kind="stable")
    return [float(losses[part].mean()) for part in (*np.array_split(order, 3), order)]


def difference(found: Losses, arm: str, group: int) -> tuple[float, float]:
    """Return the mean over seeds of `arm`'s loss minus the random half's, and half the width of its 95% interval."""
    pairs = zip(found[arm], found[CONTROL], strict=True)
    values = [one[group] - other[group] for one, other in pairs]
    return statistics.mean(values), QUANTILE[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def write(found: Losses, config: AblateConfig, rules: FilterRules, out: Path) -> None:
    table = {
        arm: {group: difference(found, arm, place) for place, group in enumerate(GROUPS)}
        for arm in found
        if arm != CONTROL
    }
    named = {
        arm: {group: dict(zip(("difference", "half_width"), one, strict=True)) for group, one in row.items()}
        for arm, row in table.items()
    }
    content = {"losses": found, f"against {CONTROL}": named, "ablate": plain(config), "rules": plain(rules)}
    write_json(out / "ablation.json", content)
    drawn = picture((8, 4), partial(_draw, table), transparent=False)
    write_bytes(out / "ablation.png", drawn)
    cells = {arm: [f"{mean:+.4f} ± {width:.4f}" for mean, width in row.values()] for arm, row in table.items()}
    lines = "".join(
        f"<tr><td>{arm}</td>{''.join(f'<td class=n>{cell}</td>' for cell in row)}</tr>" for arm, row in cells.items()
    )
    body = (
        f"<h1>Does filtering help?</h1><p>Held-out loss minus that of the {CONTROL}, nats per token, at equal tokens: "
        f"{config.seeds} paired seeds, {config.steps} steps; ± is half of the 95% interval. Negative is better.</p>"
        f"<table><tr><th></th>{''.join(f'<th>{group}</th>' for group in GROUPS)}</tr>{lines}</table>"
        f"<img alt='differences' src='{data_url(drawn)}'>"
    )
    write_text(out / "ablation.html", page("Does filtering help?", body))
    for arm, row in cells.items():
        shown = ", ".join(f"{group} {cell}" for group, cell in zip(GROUPS, row, strict=True))
        print(f"{arm} minus {CONTROL}: {shown}")
    print(f"ablation: {out / 'ablation.html'}")


def _draw(table: dict[str, dict[str, tuple[float, float]]], axes: Any) -> None:
    """Draw the differences from the random half, with their confidence intervals."""
    for number, (arm, row) in enumerate(table.items()):
        means, widths = zip(*row.values(), strict=True)
        places = np.arange(len(GROUPS)) + (number - 1) * 0.18
        axes.errorbar(places, means, widths, fmt="o", capsize=4, color=COLOURS[arm], label=arm)
    axes.axhline(0, color=COLOURS[CONTROL], linewidth=1)
    axes.set_xticks(range(len(GROUPS)), GROUPS)
    axes.set_ylabel(f"held-out loss minus that of the {CONTROL}\nnats per token")
    axes.legend(frameon=False)
