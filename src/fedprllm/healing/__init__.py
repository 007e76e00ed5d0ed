"""Healing a pruned model together: norms, biases and a scale per row, trained by sums of gradients."""
