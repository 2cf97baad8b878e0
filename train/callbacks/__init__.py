"""Callbacks around the training step."""
