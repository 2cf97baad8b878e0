"""Filter training data: drop what is easy, broken, repeated or taken from an evaluation set, and say why.

Stages in order: ingest (any input to uniform shards of records), screen (gates, contamination, duplicates), score,
select, audit. A killed filter resumes: each stage's shards are parquet files with a manifest written last.
"""
