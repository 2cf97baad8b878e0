"""DeepSpeed's ZeRO as an engine, behind our parameter names and slices."""
