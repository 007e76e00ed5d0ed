"""The participant's side of a federation: the process on its machine."""
