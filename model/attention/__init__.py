"""Attention of iRoPE layers: the module, its plan for a batch, segments of packed rows, rotary positions."""
