"""Measure the idle time of pipelines, and compute it from the schedule alone."""
