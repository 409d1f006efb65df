"""The format on disk, as README.md describes it: names, metadata, shards, records, and how numbers are stored."""
