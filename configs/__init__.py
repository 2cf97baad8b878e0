"""Hydra's YAML groups, shipped as package data."""
