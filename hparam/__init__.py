"""Hyperparameters that carry over from a small model to a large one. Built in a later part of the plan."""
