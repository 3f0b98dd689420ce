"""Programs around the OpenAI-compatible server of a checkout."""
