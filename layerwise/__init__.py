"""Train deep networks one gradient-isolated module at a time, from an activation cache on disk."""
