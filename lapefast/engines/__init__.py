"""Who runs the model."""
