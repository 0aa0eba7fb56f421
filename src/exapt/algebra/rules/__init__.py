"""Merge rules, one a file: a typed function of one tensor of every model, whose keyword arguments are its configuration."""
