"""The theorems, checked on one model."""
