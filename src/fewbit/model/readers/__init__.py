"""Readers: one source of models a file, each with `read(...) -> torch.fx.GraphModule` in the standard form."""
