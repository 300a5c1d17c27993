"""The command line: each module runs as `python -m tools.X` and as `zoo X`."""
