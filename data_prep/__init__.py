"""Captions and images in, checked WebDataset shards out."""
