"""Measurements of whole runs and of what they store."""
