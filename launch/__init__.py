"""How a run reaches machines: the `leviathan` command, torchrun on this machine, and the doctor."""
