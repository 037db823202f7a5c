"""Opens a saved run on its text to list latents, steer, and export."""
