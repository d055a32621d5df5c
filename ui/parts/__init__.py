"""What two tabs share: drawings, notices, forms and the live reading of the record."""
