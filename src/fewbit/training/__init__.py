"""Training with codes in the loop: layers and steps that learn, estimators of gradients, losses that teach."""
