"""The command line `tokenprune`."""
