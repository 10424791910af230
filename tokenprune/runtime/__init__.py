"""The wrapped model: programs, their cache, what a call runs and returns."""
