"""What a traced graph says: blocks, sites, which dims count tokens, what each operator does."""
