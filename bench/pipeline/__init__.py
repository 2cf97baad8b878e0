"""Idle time of pipelines: measured, and computed from the schedule alone."""
