"""softmax and log_softmax of rows, forward and backward."""
