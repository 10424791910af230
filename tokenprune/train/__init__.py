"""Training on `transformers.Trainer`."""
