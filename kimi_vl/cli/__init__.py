"""What the command ``kimi-vl`` runs. Each subcommand is a module here; nothing else of the package imports these."""
