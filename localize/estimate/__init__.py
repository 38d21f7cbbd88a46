"""Memory, time and arithmetic of a training step, before it runs."""
