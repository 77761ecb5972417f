"""Generated from protos/hone/v1 by tools/protos.sh; only hone.rpc imports it."""
