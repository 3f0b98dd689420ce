"""The machine: its GPU, its memory, and how an engine divides that."""
