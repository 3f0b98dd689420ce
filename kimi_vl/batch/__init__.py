"""Many requests from a file to a file, in the lines of OpenAI's batch API, without a server between them."""
