"""The shelf of ways to tune: one file each."""
