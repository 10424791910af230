"""What says which tokens matter."""
