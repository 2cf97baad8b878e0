"""Rules that drop records before they are scored: broken text, duplicates and contamination."""
