"""Graph passes: the only code that edits a traced graph."""
