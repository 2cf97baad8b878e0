"""Turn text into batches: sources, tokenizer, token shards, and a sample order that is a pure function of the step."""
