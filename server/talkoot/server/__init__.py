"""The operator: supervisor, gateway, ServerApp, rounds, ledger, aggregation, transfer service."""
