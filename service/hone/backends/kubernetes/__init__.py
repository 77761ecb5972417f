"""A cluster as a backend: every attempt is one Kubernetes Job.

client.py speaks HTTP, cache.py watches, objects.py keeps what is used of each object, observe.py says what it means,
backend.py acts.
"""
