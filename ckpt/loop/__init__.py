"""The object around a training loop: when to save, from where to go on, and when to stop."""
