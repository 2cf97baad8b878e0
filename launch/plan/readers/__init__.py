"""Readers of published measurements: one module per kind of table, recognised from its header."""
