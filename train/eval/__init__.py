"""Evaluation: held-out loss, lm-eval tasks, generation, contamination."""
