"""From text to token windows: sources, documents, tokens, windows, and dealing windows out."""
