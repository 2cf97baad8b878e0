"""Processes and what passes between them: the world, collectives with gradients, the watchdog."""
