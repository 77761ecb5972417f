"""A real Kubernetes on this machine, for tests: two nodes, an S3 server, PostgreSQL, and the images that are tested.

`make cluster`, `make images` and `make cluster-down` call it (`python -m tests.cluster.harness up | images | down`),
and the fixtures of tests/cluster/conftest.py use what it started. Needs root on Debian 12 with cgroup v1; everything
that it starts listens on loopback or on its own bridges.
"""
