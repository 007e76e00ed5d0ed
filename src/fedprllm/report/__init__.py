"""A run as a self-contained HTML page: figures from the run's record, no network access, no scripts."""
