"""One walk over the blocks of a model: what participants contribute, and what is decided."""
