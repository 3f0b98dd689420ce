"""The application of ``kimi-vl serve`` in replicas on Ray Serve: one engine each."""
