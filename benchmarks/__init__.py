"""Scripts that print a table: what the product does beside what it is compared with, same work, one run."""
