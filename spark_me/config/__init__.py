"""Configurations: what a run may be told, and how files and the command line say it."""
