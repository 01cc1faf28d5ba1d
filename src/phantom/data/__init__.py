"""Clips in, latents out."""
