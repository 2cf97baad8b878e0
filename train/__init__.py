"""Train a model: one run, from a configuration to checkpoints in the run's directory."""
