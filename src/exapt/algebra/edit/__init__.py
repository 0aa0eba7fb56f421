"""Knowledge editing: a model answers a few inputs as wanted, related ones too, and the rest as before."""
