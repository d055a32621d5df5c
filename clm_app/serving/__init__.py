"""Serving: a backend loads one version in a host child, and the router sends each conversation to the right host."""
