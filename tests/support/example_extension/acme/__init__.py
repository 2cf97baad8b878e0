"""A user's own package, outside of Leviathan's."""
