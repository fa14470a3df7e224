"""What the targets of the PyTorch family share: a program as a module in Q/DQ form, and its export."""
