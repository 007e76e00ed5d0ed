"""The coordinator's side of a federation: rounds, checks of updates, and the result."""
