"""The shelf of what can run a model: one file each."""
