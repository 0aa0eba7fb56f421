"""The algebra of parameter shifts: merge, edit, compress, compose. Pure functions of named tensors; nothing here trains."""
