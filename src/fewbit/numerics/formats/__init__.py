"""Number formats: one family a file, with `PATTERN` (a regular expression for its names), `EXAMPLES` and `make(match)`."""
