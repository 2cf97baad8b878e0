"""Checks of machines, nodes and links: the doctor."""
