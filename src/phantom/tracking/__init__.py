"""MLflow: runs, lineage, checkpoint uploads and the model registry. No other package imports mlflow."""
