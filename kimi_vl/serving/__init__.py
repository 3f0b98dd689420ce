"""The OpenAI-compatible HTTP server: bodies to requests of a pipeline, events to answers, and what a client may cost.

``protocol``, ``responses`` and ``errors`` know no HTTP server; the others are one ASGI application around one pipeline.
"""
