"""A store of activations: standard Zarr v3 on disk, read at memory speed, keyed to what made it."""
