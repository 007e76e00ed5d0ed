"""What other tools can use of a run besides its model."""
