"""The shelf of repairs: one file is one rung of the ladder that a candidate climbs before it is refused."""
