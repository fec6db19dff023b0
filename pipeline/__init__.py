"""Teacher in, smaller fine-tuned and measured descendant out."""
