"""How data comes in: read, checked, split and frozen."""
