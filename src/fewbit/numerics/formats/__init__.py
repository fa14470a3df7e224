"""Number formats: one family a file, with `PATTERN` (what its names match), `EXAMPLES` and `make(match)`."""
