"""Checks of machines and links: the doctor."""
