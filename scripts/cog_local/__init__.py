"""Cog without Docker: the schema, the real HTTP server, a client, and the two commands built on them."""
