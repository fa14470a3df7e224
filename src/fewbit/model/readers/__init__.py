"""Readers: one source of models a file, each with `read(...)`, which gives a graph in the standard form."""
