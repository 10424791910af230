"""What becomes of the tokens that a stage does not keep."""
