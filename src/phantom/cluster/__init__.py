"""Stages as jobs on Kubernetes: what a job is (`spec`), as manifests (`render`), checked (`check`), run (`submit`)."""
