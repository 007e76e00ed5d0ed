"""Solvers: weights that reproduce a Linear's outputs with many of its weights set to zero."""
