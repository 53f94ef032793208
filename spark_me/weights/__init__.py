"""Weights in and out: layouts, converters, safe loading."""
