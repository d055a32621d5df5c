"""The shelf of ways against forgetting: one file each."""
