"""Measurements of pictures and of the vision encoder."""
