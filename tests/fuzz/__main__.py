"""Fuzz the parsers for some minutes: `python -m tests.fuzz MINUTES [WORD]`. `WORD` chooses targets by their names.

Each turn runs one target, in a process of its own, with examples that were not run before. The first failure ends the
program, after its smallest example.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time

TURN_S, FIRST_EXAMPLES, MOST_EXAMPLES = 60.0, 300, 20_000


def main(minutes: float, word: str = "") -> int:
    end = time.monotonic() + 60 * minutes
    targets = [line for line in _pytest("--collect-only", "-k", word).stdout.splitlines() if "::" in line]
    sizes, done = dict.fromkeys(targets, FIRST_EXAMPLES), dict.fromkeys(targets, 0)
    for turn in itertools.count():
        target = targets[turn % len(targets)]
        begin, seed = time.monotonic(), random.SystemRandom().getrandbits(32)
        if begin > end:
            break
        result = _pytest(target, f"--hypothesis-seed={seed}", EXAMPLES=str(sizes[target]))
        took = time.monotonic() - begin
        if result.returncode:
            print(result.stdout, result.stderr, f"{target} failed with seed {seed}", sep="\n", flush=True)
            return 1
        done[target] += sizes[target]
        line = f"{sizes[target]:6,} examples in {took:3.0f} s, {done[target]:8,} so far: {target}"
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
        sizes[target] = max(FIRST_EXAMPLES, min(MOST_EXAMPLES, int(sizes[target] * TURN_S / took)))
    print(f"no failure in {sum(done.values()):,} examples of {len(targets)} targets")
    return 0


def _pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "HYPOTHESIS": "fuzz", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        [*command, *(() if "::" in arguments[0] else ("tests/fuzz",))], env=variables, capture_output=True, text=True
    )


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *sys.argv[2:]))
