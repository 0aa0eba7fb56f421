"""Networks that emit networks: adapters from contexts, weights from architectures, and experts from dense layers."""
