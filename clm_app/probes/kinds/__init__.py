"""The shelf of kinds of benchmark: one file each says what a model is asked and what its answer is worth."""
