"""Compression of adapters: codecs of their tensors, transforms of their rules, and the search for the smallest file that keeps a quality."""
