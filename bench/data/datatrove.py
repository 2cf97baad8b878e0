"""Filter one file with our filter and with datatrove, on one core: `python -m bench.data.datatrove PYTHON`.

PYTHON is the interpreter of an environment with `pip install datatrove regex spacy tokenizers orjson "xxhash<4"`. Both
sides read the same JSON lines from disk and write what they keep. They take turns, each turn in a new process.

Near-duplicates: theirs are the four steps of MinHash with its defaults (5-grams, 14 buckets of 8 hashes), which drop a
record for one equal bucket; ours is the whole filter without gates and with a score that costs nothing, 21 bands of 6
hashes and verified candidates. Quality: theirs are the filters of Gopher (repetition, quality) and FineWeb; ours is the
whole filter without the search for duplicates, with the gates and the n-gram score.

Their near-duplicates miss fewer pairs above 0.8 and drop far more below, because one bucket is enough. Ours miss no
pair by the bands, but the estimate by 128 hashes errs by 0.035 (standard error) to both sides of the threshold.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.measure import HEADER, Result, machine, median_ratio, spread
from data.filter.screen.duplicates import ngram_hashes
from data.filter.screen.normalise import words as normalised_words

THEIRS = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.logging import logger
logger.remove()
what, source, out = sys.argv[1:]
def execute(*steps, tasks=1):
    logs = f"{out}/logs"
    LocalPipelineExecutor(list(steps), tasks, workers=1, logging_dir=logs, skip_completed=False).run()
def reader():
    return JsonlReader(source)
def writer():
    return JsonlWriter(f"{out}/kept", compression=None)
if what == "quality":
    filters = [GopherRepetitionFilter(), GopherQualityFilter(), FineWebQualityFilter()]
    execute(reader(), *filters, writer())
else:
    execute(reader(), MinhashDedupSignature(f"{out}/signatures"))
    execute(MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets"), tasks=14)
    execute(MinhashDedupCluster(f"{out}/buckets", f"{out}/remove"))
    execute(reader(), MinhashDedupFilter(f"{out}/remove"), writer())
"""
OURS = """
import sys
from pathlib import Path
from data.filter.audit.outputs import write_kept
from data.filter.config import DuplicateConfig, FilterRules, GateConfig, InputConfig, ScorerConfig, ScorerKind
from data.filter.input.readers import input_parts
from data.filter.pipeline import Filter, FilterJob
from data.filter.score.factory import make_scorer
from data.filter.store import OneWorker
what, source, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
no_gates = GateConfig(min_characters=None, repetition=False, non_text=False, scrambled=False)
rules = FilterRules(
    keep=1.0, scorer=ScorerConfig(kind=ScorerKind.length if what == "duplicates" else ScorerKind.ngram),
    gates=no_gates if what == "duplicates" else GateConfig(),
    duplicates=DuplicateConfig(exact=False, near=None) if what == "quality" else DuplicateConfig(),
)
done = Filter(FilterJob(
    parts=input_parts(InputConfig(input=source, id_key="id")), rules=rules, directory=out / "stages",
    workers=OneWorker(), scorer=make_scorer(rules.scorer, None, out, 0),
    report=lambda line: None,
))
done.run()
(out / "kept").mkdir()
write_kept(done, out / "kept" / "kept.jsonl")
"""
HERE = Path(__file__).resolve().parent.parent.parent
PLANTED = 0.1
WHAT = {"duplicates": "near-duplicates", "quality": "quality filter"}


def prose(count: int, seed: int) -> tuple[list[dict[str, str]], dict[str, float]]:
    """Return records of prose, some of which repeat the one before with other words in some places. For these the
    Jaccard similarity of the word 5-grams, by the number in the id. The prose is from docstrings of installed packages.
    """
    chance = random.Random(seed)
    found: set[str] = set()
    for path in sorted(Path(np.__file__).parents[1].rglob("*.py"))[::9]:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
                found |= {" ".join(part.split()) for part in text.split("\n\n") if part.count(" ") > 15 and "." in part}
    paragraphs, records, copies = sorted(found), [], {}
    for number in range(count):
        text = "\n".join(chance.choices(paragraphs, k=chance.randrange(4, 12)))
        records.append({"id": f"o{number}", "text": text})
        if chance.random() < PLANTED:
            words = text.split(" ")
            for place in chance.sample(range(len(words)), max(len(words) * chance.randrange(1, 5) // 100, 1)):
                words[place] = "replaced"
            records.append({"id": f"c{number}", "text": " ".join(words)})
            one, other = (ngram_hashes(normalised_words(record["text"]), 5) for record in records[-2:])
            copies[f"{number}"] = len(np.intersect1d(one, other)) / len(np.union1d(one, other))
    return records, copies


def turn(python: str, script: str, what: str, source: Path) -> tuple[dict[str, float], set[str]]:
    """Run one side in a new process. Return its wall and CPU seconds and the ids that it keeps."""
    with tempfile.TemporaryDirectory() as out:
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [python, "-c", script, what, str(source), out]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        kept = [line for path in Path(out, "kept").iterdir() for line in path.read_text().splitlines()]
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"wall": wall, "CPU": cpu}, {json.loads(line)["id"] for line in kept}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.data.datatrove", description=__doc__)
    parser.add_argument("python", help="the interpreter of the environment with datatrove")
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(arguments)
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in"
        source.mkdir()
        records, copies = prose(chosen.records, seed=1)
        (source / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        size = (source / "in.jsonl").stat().st_size / 1e6
        print(f"{machine()}\n{len(records):,} records, {size:.1f} MB, {len(copies)} planted copies\n\n{HEADER}")
        for what, name in WHAT.items():
            pairs = []
            for number in range(chosen.rounds):
                sides = [(sys.executable, OURS), (chosen.python, THEIRS)]
                found = [turn(*side, what, source) for side in (sides[::-1] if number % 2 else sides)]
                pairs.append(found[::-1] if number % 2 else found)
            for clock in ("wall", "CPU"):
                ours, theirs = ([pair[side][0][clock] for pair in pairs] for side in (0, 1))
                ratio, rates = median_ratio(theirs, ours), [1 / statistics.median(times) for times in (ours, theirs)]
                note = " and ".join(f"{rate * len(records):,.0f}" for rate in rates) + " records/s, "
                note += f"{chosen.rounds} pairs, spread {spread(ours):.0%}"
                row = Result(
                    f"{name}, ours vs datatrove, {clock} time (MB/s)",
                    size * rates[0],
                    size * rates[1],
                    ratio,
                    ">= 1.0 times",
                    ratio >= 1,
                    note,
                )
                print(row.row)
            for who, (_, kept) in zip(("ours", "theirs"), pairs[-1], strict=True):
                dropped = {number: not {f"o{number}", f"c{number}"} <= kept for number in copies}
                near = [dropped[number] for number, similarity in copies.items() if similarity >= 0.8]
                far = [dropped[number] for number, similarity in copies.items() if similarity < 0.8]
                pairs_of = f"{sum(near)} of {len(near)} pairs from 0.8 on, {sum(far)} of {len(far)} below"
                print(f"{name}, {who}: kept {len(kept):,} of {len(records):,}; dropped of {pairs_of}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
