"""What a model does with its attention: massive activations, and how widely each layer looks."""
