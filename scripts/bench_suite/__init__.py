"""What `scripts/bench` measures, a module for each subcommand; every figure stands beside its ceiling."""
