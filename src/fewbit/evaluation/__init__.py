"""What a model is worth and what it costs: quality, error by layer, size, work, time, memory, energy."""
