"""The layers that a user puts into a model; they are imported from :mod:`p4flows`."""
