"""How good a model is: perplexity on text, and zero-shot tasks."""
