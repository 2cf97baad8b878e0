"""Parallelism: the layout of ranks, its meshes, and one file per technique, applied from outside the model."""
