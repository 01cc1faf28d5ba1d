"""A service that generates videos: a queue of jobs in a database, and worker processes."""
