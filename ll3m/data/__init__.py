"""Text in, batches out: tokenizers, seqio tasks and mixtures, packing, resumable streams."""
