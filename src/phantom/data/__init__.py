"""The data pipeline: source videos to clips (`prepare`), clips to latent shards (`encode`)."""
