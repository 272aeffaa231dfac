"""Requests, streams and the queue that batches their windows."""
