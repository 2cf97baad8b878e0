"""SLURM: submission, the step on each node, requeue, the list of jobs."""
