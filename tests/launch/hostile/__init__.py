"""Hostile values, files, words and environments, and how commands end that meet them."""
