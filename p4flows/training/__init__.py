"""What runs beside an optimizer; it is imported from :mod:`p4flows`."""
