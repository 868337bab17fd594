"""From text to batches: sources, tokenizers, the token store, packing, mixtures."""
