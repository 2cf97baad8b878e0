"""Filter a file, a data set or a stream, in this process or in several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from core.config import plain
from core.errors import ConfigError, counted
from core.exit_codes import CRASHED, has_agent
from core.files import write_json
from core.process import ending_with_parent
from data.config import TokenizerConfig, TokenizerKind
from data.filter.audit.findings import conclusion, summary, text_only
from data.filter.audit.outputs import (
    AUDIT_PAGE,
    KEPT,
    KEPT_DOCUMENTS,
    SCORES,
    write_audit_of,
    write_kept,
    write_kept_documents,
    write_scores,
)
from data.filter.config import under
from data.filter.input.documents import document_parts
from data.filter.input.readers import clean_records, input_parts
from data.filter.input.records import Record
from data.filter.pipeline import Filter, FilterJob
from data.filter.score.factory import check_models, make_scorer
from data.filter.score.scorer import CostlyScorer, Scorer
from data.filter.select.lines import COUNTS, LineFilter
from data.filter.store import KEY, OneWorker, Workers, barrier
from data.tokenizer import Tokenizer, from_file, load_tokenizer
from launch.diagnose.machine import check_processes
from launch.filter.config import FilterConfig, command_of
from launch.filter.workers import WorldWorkers
from launch.ranks import run_ranks
from parallel.comm.world import connect
from train.eval.contamination import MODELS

STAGES = "stages"


def run_filter(config: FilterConfig, out: Path) -> int:
    """Filter `input` or `dataset`, on the ranks that torchrun started if there are any."""
    with ending_with_parent(has_agent()), closing(connect()) as world:
        _filter(config, out, WorldWorkers(world) if world.size > 1 else OneWorker())
    return 0


def _filter(config: FilterConfig, out: Path, workers: Workers) -> None:
    ours = [name for name in (KEPT, KEPT_DOCUMENTS, SCORES, AUDIT_PAGE) if (out / name).exists()]
    if ours and not any((out / STAGES).glob(f"*/{KEY}")):
        raise ConfigError("out", str(out), f"holds {ours[0]}, but no filter run; choose another folder")
    tokenizer = _tokenizer(config)
    job = FilterJob(
        parts=input_parts(config) if config.images is None else document_parts(config),
        rules=config.rules(),
        scorer=_scorer(config, out),
        directory=out / STAGES,
        workers=workers,
        report=print if workers.rank == 0 else lambda line: None,
        count_tokens=_count_tokens(tokenizer),
        models=MODELS,
        tokenizer="bytes" if tokenizer is None else tokenizer.fingerprint,
        clean=clean_records(config.select.clean, config) if config.select.clean else (),
    )
    done = Filter(job)
    done.run()
    with barrier(workers):
        if workers.rank == 0:
            write_scores(done, out / SCORES)
            if config.images is None:
                write_kept(done, out / KEPT)
            else:
                write_kept_documents(done, out / KEPT_DOCUMENTS)
            audit = write_audit_of(done, out, str(config.input or config.dataset), command_of(config))
            print(summary(audit))
            if (note := text_only(audit)) is not None:
                print(note)
            for warning in audit["warnings"]:
                print(f"warning: {warning['text']}")
            for line in conclusion(audit):
                print(line)
            print(f"audit: {out / AUDIT_PAGE}")


def run_stream(config: FilterConfig, out: Path) -> int:
    """Filter standard input until it ends, then print the counts."""

    def check(records: Sequence[Record]) -> None:
        check_models(MODELS, config.rules().scorer, lambda: records, print)
        if isinstance(scorer, CostlyScorer) and (cost := scorer.cost(lambda: records)):
            print(f"the first {counted(len(records), 'record')}: {cost}", flush=True)

    scorer = _scorer(config, out)
    clean = clean_records(config.select.clean, config.lines()) if config.select.clean else ()
    count_tokens = _count_tokens(_tokenizer(config))
    done = LineFilter(config.lines(), config.rules(), scorer, count_tokens, clean, check)
    done.run(sys.stdin.buffer, out)
    counts = done.counts()
    rate = "nothing was scored" if counts["rate"] is None else f"{counts['rate']:.2%} of the {counts['unit']} scored"
    reasons = ", ".join(f"{name} {count:,}" for name, count in counts["reasons"].items())
    kept = f"kept {counts['kept']:,} of {counted(counts['lines'], 'line')} ({rate}; keep={config.keep})"
    print(kept + (f": {reasons}" if reasons else ""))
    print(f"a stream has no length buckets and is not searched for duplicates; counts: {out / COUNTS}")
    return 0


def _scorer(config: FilterConfig, out: Path) -> Scorer:
    with under("scorer"):
        return make_scorer(config.rules().scorer, MODELS, out / STAGES, config.seed)


def _count_tokens(tokenizer: Tokenizer | None) -> Callable[[Sequence[str]], Sequence[int]] | None:
    return None if tokenizer is None else lambda texts: [len(ids) for ids in tokenizer.encode(texts)]


def _tokenizer(config: FilterConfig) -> Tokenizer | None:
    if config.tokenizer is None:
        return None
    path = Path(config.tokenizer).expanduser()
    if path.is_dir():
        return load_tokenizer(path)
    try:
        return from_file(TokenizerConfig(kind=TokenizerKind.tokenizer_json, path=str(path)))
    except ConfigError as error:
        raise ConfigError("tokenizer", config.tokenizer, error.reason) from None


def run_processes(config: FilterConfig, out: Path) -> int:
    """Do what `torchrun --nproc-per-node N -m launch.verbs.filter` does, with the agent in this process."""
    from launch.agent import Node

    check_processes("processes", config.processes, config.oversubscribe)
    node = Node(command=("-m", "launch.rank", "filter"), ranks=config.processes, logs=out / "logs", job="filter")
    code = run_ranks(node, lambda path: write_json(path, plain(config)))
    return 1 if code == CRASHED else code
