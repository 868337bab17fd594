"""Generation: token choice, and prefill and decode with a KV cache."""
