"""What is done with a pretrained network: classify, probe, predict, export."""
