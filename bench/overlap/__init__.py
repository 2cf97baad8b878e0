"""Measure how much of the experts' exchange, and of FSDP2's gathers, hides behind other work, on gloo ranks."""
