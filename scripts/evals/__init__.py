"""The demo's questions for the evaluation programs of others; `scripts/evals/run`."""
