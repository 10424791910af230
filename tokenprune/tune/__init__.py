"""Spend a budget where it costs least, and see what methods do to one's own model."""
