"""RMSNorm and LayerNorm, with or without a residual addition before them."""
