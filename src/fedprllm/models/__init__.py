"""Hugging Face causal language models, one block at a time."""
