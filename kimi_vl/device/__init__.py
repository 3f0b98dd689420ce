"""The machine: its GPU and its memory. Knows no model."""
