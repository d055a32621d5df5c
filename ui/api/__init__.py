"""The shelf of routes: one file each."""
