"""From text to batches: sources, tokenizer, token shards, and an order that is a pure function of the step."""
