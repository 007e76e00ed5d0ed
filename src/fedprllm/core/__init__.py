"""The mathematics: tensors in, tensors out.

No I/O, no logging, no clock, no engine, no choice of device. A mask entry that is True is pruned.
"""
