"""The demonstration: a real model pruned by four participants, and by the alternatives."""
