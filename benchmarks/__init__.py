"""Time and memory, measured: a script each, fixed seeds, JSON on the last line. Never part of the tests."""
