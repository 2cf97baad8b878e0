"""Scorers, which measure the difficulty of a record by n-grams, model losses, an LLM judge or pass rates."""
