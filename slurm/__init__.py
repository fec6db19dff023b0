"""A graph of stages as SLURM jobs."""
