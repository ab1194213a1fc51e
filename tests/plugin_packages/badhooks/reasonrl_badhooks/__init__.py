"""Observers that cannot be used, one a module."""
