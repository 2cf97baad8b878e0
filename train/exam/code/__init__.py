"""Examinations whose answers are programs. They run in a sandbox only."""
