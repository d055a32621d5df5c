"""When things happen: the clock, the ledger, the children and the update cycle."""
