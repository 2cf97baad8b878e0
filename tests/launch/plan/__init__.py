"""Tests of the planner.

The tables here are samples of published measurements: sweep.csv of nanotron's sweep of layouts (Ultra-Scale Playbook),
peaks.csv of Megatron-LM's functional tests, rival.csv of SimuMax's release summary for B200, and runs.csv of the source
that each of its rows names.
"""
