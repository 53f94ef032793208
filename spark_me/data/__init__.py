"""Images for pretraining: listing files, reading them safely, augmenting and batching them reproducibly."""
