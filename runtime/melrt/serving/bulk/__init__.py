"""Bulk synthesis of folders and parquet files, on one machine or on a Ray cluster."""
