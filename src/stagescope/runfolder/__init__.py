"""The run folder: its schema, its rows, and Parquet."""
