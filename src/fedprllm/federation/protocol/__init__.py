"""What coordinator and participants say to each other, byte by byte."""
