"""An adapter and a scorer for tokenprune, found by their entry points."""
