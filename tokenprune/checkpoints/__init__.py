"""Wrapped models on disk: our directories and the DynamicViT authors' files."""
