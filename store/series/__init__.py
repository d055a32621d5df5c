"""Measurements over time, kept as JSON lines and asked with DuckDB."""
