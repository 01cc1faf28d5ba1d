"""MLflow: runs, lineage, uploads, the model registry. No other part of the project talks to it."""
