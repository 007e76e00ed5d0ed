"""NVIDIA FLARE carries the messages of a federation; nothing outside this folder knows it."""
