"""Parallelism: the layout of ranks, its meshes, and one file per technique. Techniques wrap a model from outside."""
