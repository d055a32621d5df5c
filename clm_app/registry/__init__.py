"""Versions, their weights and where they came from."""
