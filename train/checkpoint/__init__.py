"""Checkpoints: sharded state, files and their index, saving, resuming and initial weights."""
