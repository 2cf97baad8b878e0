"""Search the layouts of a run of this framework: which fit, and which is the fastest."""
