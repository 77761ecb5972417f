"""Generated from protos/hone/v1 by tools/generated.sh; only hone.rpc imports it."""
