"""The study: one command that answers the paper's questions on any model and text."""
