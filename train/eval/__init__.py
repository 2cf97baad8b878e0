"""Evaluate models: held-out loss, lm-eval tasks, generation and contamination."""
