"""The participant's side of a federation: consent, computation, and replies to the coordinator."""
