"""Filter training data: drop easy, broken, duplicate and contaminated documents, and report why each was dropped.

The stages are ingest (turn any input into uniform shards of records), screen (gates, contamination, duplicates), score,
select and audit. A stage writes its shards as parquet files. After a kill, a rerun makes only the missing shards.
"""
