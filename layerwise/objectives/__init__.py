"""Local losses, one a file, each citing its paper."""
