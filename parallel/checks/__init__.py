"""Checks of what a step issues, on any machine: races between streams, deadlocks between ranks, order of gathers."""
