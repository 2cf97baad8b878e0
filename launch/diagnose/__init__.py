"""Check machines, nodes and links, for the doctor."""
