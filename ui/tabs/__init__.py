"""The shelf of tabs: one file each."""
