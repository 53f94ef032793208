"""After pretraining: predictions, features, probes, exports. Needs neither MinkowskiEngine nor the trainer."""
