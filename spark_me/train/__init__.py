"""Pretraining and fine-tuning: from a configuration to a run directory with checkpoints, curves and pictures."""
