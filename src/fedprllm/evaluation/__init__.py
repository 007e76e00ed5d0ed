"""Model quality: perplexity on text and zero-shot tasks."""
