"""Training and fine-tuning of a voice: data, discriminators, losses, and the training loop."""
