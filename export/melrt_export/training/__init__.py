"""Training and fine-tuning of a voice: MelGAN's networks, losses and data, and the loop that runs them."""
