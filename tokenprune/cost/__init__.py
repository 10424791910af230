"""What a model costs: multiply-accumulates and time."""
