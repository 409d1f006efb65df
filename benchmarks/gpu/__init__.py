"""Everything that this toolkit claims of a GPU, measured by one command: `python -m benchmarks.gpu`."""
