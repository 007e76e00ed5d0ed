"""The walk over the blocks of a model: what each participant contributes and what is decided from it."""
