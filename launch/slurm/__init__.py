"""SLURM: submit jobs, run them on each node, and requeue them."""
