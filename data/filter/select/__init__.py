"""Selection by score: exact for a corpus, at a fixed rate for a stream."""
