"""SLURM: submission, the step on each node, requeue."""
