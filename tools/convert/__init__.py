"""Hugging Face folders into runs and back."""
