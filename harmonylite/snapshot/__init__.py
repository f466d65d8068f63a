"""Snapshots: copies of the database from which new or late nodes catch up (docs/architecture.md)."""
