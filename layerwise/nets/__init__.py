"""Encoders, cut into gradient-isolated modules."""
