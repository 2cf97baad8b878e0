"""Data that teaches: leaves out what is easy, broken, repeated or taken from an evaluation set, and says why.

Stages, in order: ingest (any input to uniform shards of records), screen (gates, contamination, duplicates), score,
select, audit. Each stage's shards are parquet files with a manifest written last, so a killed run goes on where it was.
"""
