"""Adapters on their way to other programs and to the hub."""
