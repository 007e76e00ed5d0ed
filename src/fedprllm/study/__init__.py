"""The study: one command that answers the paper's questions for any model and text."""
