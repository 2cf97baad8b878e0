"""What every other room may use: errors, typed configuration, atomic files. Imports nothing of Leviathan."""
