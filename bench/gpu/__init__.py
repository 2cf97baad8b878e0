"""What one GPU does, checked and timed in minutes: `python -m bench.gpu [NAME ...] [--out FILE.json] [--minutes N]`.

Everything is compared with float32 on that GPU before it is timed; what is wrong is a failed row, and the rest goes on.
Each section runs in a process of its own, so that one that dies takes no other with it, and rows are on disk as they
come. `--dry` runs the same code on a CPU with tiny shapes: its figures mean nothing and are marked.

It imports torch and our own packages only, none of them with Hydra: a GPU host without a network can run it.
Transformers, Transformer Engine and torchtitan take part if they are installed; otherwise a row says what is missing.

The file holds one object, the calibration that planning reads:

    schema    1
    dry       whether the figures are of tiny shapes on a CPU, and so mean nothing
    machine   facts: device, memory_bytes, capability, multiprocessors, driver, cuda, torch, triton, transformers, ...
    seconds   how long it all took
    rows      a list of objects with the fields of `bench.gpu.record.BenchRow`
"""
