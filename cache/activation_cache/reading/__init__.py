"""From a finished cache to samples and batches."""
