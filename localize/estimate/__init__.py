"""Memory, seconds and arithmetic of a training step, before it is trained."""
