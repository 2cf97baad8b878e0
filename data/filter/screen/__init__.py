"""Rules that drop records before any score: broken text, copies, contamination."""
