"""What is remembered: SQLite for the record, files for what is large, DuckDB to ask questions of measurements."""
