"""Engines turn batches into updates: FSDP2 or DeepSpeed."""
