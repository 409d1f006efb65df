"""Creating, filling, committing, mending and removing caches."""
