"""From prompts, images and clips to videos: the diffusers pipeline and `phantom generate`."""
