"""What is decided by measuring: how much each layer minds few bits."""
