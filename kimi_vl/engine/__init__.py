"""The serving engine: one thread that batches every request."""
