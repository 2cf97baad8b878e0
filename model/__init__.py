"""The network for one device: layers, roles of parameters, initial weights and FLOPs. Independent of ranks."""
