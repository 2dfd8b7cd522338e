"""What a training run is made of: optimizer, loss, step, metrics, evaluation and logging."""
