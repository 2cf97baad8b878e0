"""Measure start-up, hangs and checkpoint plans at the scale of thousands of ranks, in one process."""
