"""Filter training data: drop documents that are easy, broken, repeated or from an evaluation set, and report why.

The stages are ingest (turn any input into uniform shards of records), screen (gates, contamination, duplicates), score,
select and audit. A killed filter resumes: the shards of a stage are parquet files with a manifest that is written last.
"""
