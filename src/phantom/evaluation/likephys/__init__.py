"""LikePhys (Yuan et al., ICLR 2026, arXiv 2510.11512): whether a model denoises possible videos better than impossible.

No video is sampled, and no judge is asked.
"""
