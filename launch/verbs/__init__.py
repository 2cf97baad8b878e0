"""The verbs of the `leviathan` command."""
