"""RMSNorm and LayerNorm, with or without the residual addition before them."""
