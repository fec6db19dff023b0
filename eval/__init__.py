"""Checkpoint in, numbers out: works on anything with `encode_image` and `encode_text`."""
