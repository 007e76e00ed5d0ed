"""Pure computation: tensors in, tensors out.

No I/O, no logging, no clock, no federation engine, no choice of device. A mask entry of True means pruned.
"""
