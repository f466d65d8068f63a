"""HarmonyLite: leaderless SQLite replication for edge devices, through NATS JetStream."""

__version__ = "0.1.0"
