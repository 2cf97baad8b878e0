"""Measure two computations side by side in one process, and report ratios."""
