"""Recovery: detect trouble in a run, find its cause, go back to a good checkpoint, skip or mitigate, keep a ledger."""
