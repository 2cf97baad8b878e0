"""Communication: the world, collectives with gradients, the watchdog."""
