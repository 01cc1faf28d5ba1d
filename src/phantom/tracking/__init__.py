"""MLflow: runs, lineage and the model registry. No other package imports mlflow."""
