"""LayerNorm and RMSNorm, forward and backward, with the residual add inside."""
