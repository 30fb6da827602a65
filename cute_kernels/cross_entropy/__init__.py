"""Cross entropy of rows of logits with class indices: losses, gradients, and both in one launch."""
