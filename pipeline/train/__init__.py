"""The training loop: the same code path from one process to many nodes."""
