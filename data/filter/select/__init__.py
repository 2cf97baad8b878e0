"""Selection by score: exact over a corpus, at a fixed rate over a stream."""
