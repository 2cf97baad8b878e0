"""Check and time one GPU in minutes: `python -m bench.gpu [NAME ...] [--out FILE.json] [--minutes N]`.

It runs the tests of the kernels first (tests/test_gpu_kernels.py, which need pytest). Matmuls, MoE layers and attention
up to 8,192 positions are compared with float32 on the GPU before they are timed. Steps and attention run on packed
documents of log-normal lengths; experts are balanced or chosen by the router. A step's time is divided into matmuls,
attention, elementwise kernels, communication, and the time in which the GPU waits for the host.

The whole command takes at most ten minutes. A wrong result becomes a failed row, and the benchmark continues. Each
section runs in a separate process, so that a crash loses one section only, and rows are written to disk at once.
`--dry` runs the same code on a CPU with tiny shapes; its measurements are meaningless and marked as such.

The benchmark needs torch but not Hydra, so that a GPU host without a network can run it. Transformers, Transformer
Engine and torchtitan are measured if they are installed; otherwise a row names what is missing.

FILE.json holds one object:

    schema    1
    dry       whether the measurements are meaningless, from tiny shapes on a CPU
    machine   facts: device, memory_bytes, capability, multiprocessors, driver, cuda, torch, triton, transformers, ...
    seconds   total time
    rows      a list of objects with the fields of `bench.gpu.record.BenchRow`
"""
