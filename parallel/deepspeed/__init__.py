"""DeepSpeed's ZeRO as an engine. Its flat buffers are read and written by our parameter names."""
