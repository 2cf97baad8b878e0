"""Checkpoints: sharded state, its files and index, saving, resuming and initial weights."""
