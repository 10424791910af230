"""Tracing of a host's forward into a graph with guards."""
