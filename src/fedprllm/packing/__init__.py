"""A pruned model as one file in which zeros take one bit: see docs/packed-format.md."""
