"""What every other room stands on: configuration, flags, sharding and checkpoints."""
