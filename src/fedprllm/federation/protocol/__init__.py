"""The messages between coordinator and participants, byte by byte."""
