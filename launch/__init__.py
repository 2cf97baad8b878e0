"""The `leviathan` command: verbs, and ways to start the ranks of a run (in process, torchrun's agent, SLURM)."""
