"""The parts of a training run: optimizer, loss, step, metrics, evaluation and logging."""
