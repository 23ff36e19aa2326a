"""What a built package needs to train: data, optimizer, balance, checkpoints, and the loop."""
