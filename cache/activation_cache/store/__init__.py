"""The byte layer: whole files in, whole files or maps of them out; in a directory or on an object store."""
