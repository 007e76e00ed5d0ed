"""A run as one self-contained HTML page: figures from the run's record, no network, no scripts."""
