"""What verbs cannot do without."""

GIVEN = {
    "evaluate": ["run=r"],
    "generate": ["run=r"],
    "import": ["source=s", "out=o"],
    "export": ["source=s", "out=o"],
    "filter": ["input=x", "scorer.kind=ngram"],
    "curate": ["input=x", "metadata=m"],
}
"""Overrides without which a verb's configuration is incomplete."""
