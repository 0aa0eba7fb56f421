"""Composition: experts from saved adapters, routers over them, and blocks of attached adapters."""
