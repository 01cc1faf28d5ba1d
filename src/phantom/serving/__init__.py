"""A service that generates videos: a queue of jobs in a database, worker processes, and a page in the browser."""
