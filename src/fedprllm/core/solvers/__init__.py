"""Solvers: prune a Linear and choose new values for the remaining weights that preserve its outputs."""
