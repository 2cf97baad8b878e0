"""Attention of iRoPE layers: the module, its plan for a batch, segments of packed sequences, and rotary positions."""
