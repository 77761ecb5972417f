"""The wire: the gRPC server, its client, and what stands between messages and our types. Only here is hone.v1 known."""
