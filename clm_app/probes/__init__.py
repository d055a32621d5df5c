"""The shelf of measures of what is known or lost in general: one file each."""
