"""Errors, configuration, atomic file writes and process setup. Imports no other package of Leviathan."""
