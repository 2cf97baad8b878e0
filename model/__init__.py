"""The network for one device, the roles of its parameters, its initial weights and its FLOPs. Knows of no ranks."""
