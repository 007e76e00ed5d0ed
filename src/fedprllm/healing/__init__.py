"""Healing a pruned model together: norms, biases and one scale per row, trained by sums of gradients alone."""
