"""One method of training a file, each `run(ctx)` read from top to bottom."""
