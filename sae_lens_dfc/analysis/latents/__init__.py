"""Max-activating examples of latents, and latent cards."""
