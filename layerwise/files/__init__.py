"""What lies in a run's folder: files that are either whole or absent, and what they say."""
