"""ZeRO by DeepSpeed, behind the names and slices of our own parameters."""
