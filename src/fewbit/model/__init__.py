"""The one graph that every source is read into, and what is known about its operators."""
