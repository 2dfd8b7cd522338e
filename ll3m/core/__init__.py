"""The package that all others build on: configuration, flags, sharding and checkpoints."""
