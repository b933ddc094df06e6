"""How episodes are kept: drawn once into Parquet, read as batches."""
