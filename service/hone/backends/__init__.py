"""Where attempts run: this machine (local.py), or a cluster (kubernetes.py). Backends do not know each other."""
