"""Studies: what `studies/<name>/study.yaml` asks, the statistics of its runs, and the page that answers it."""
