"""A host's forward as a torch.fx graph."""
