"""Training: objective, LoRA, data, the loop and its saved state."""
