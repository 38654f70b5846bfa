"""What both sides must agree on: messages, manifest, codec, artifacts, identity, leases, limits."""
