"""Floor 0: sites, the contract, the registry, attach, detach and merge, and the adapter file."""

__version__ = "0.1.0"
