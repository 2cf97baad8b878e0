"""Save, index and restore checkpoints of sharded state, and load initial weights."""
