"""AdamW over many tensors in one launch."""
