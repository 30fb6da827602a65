"""Training from the command line (`vibetensor train`, `sample`, `info`), and checkpoints."""
