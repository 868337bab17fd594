"""Published checkpoints, both ways: Hugging Face folders, their tokenizers, PEFT adapters."""
