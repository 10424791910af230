"""Calls in which images keep different numbers of tokens."""
