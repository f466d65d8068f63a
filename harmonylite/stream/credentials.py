"""What this node shows to NATS servers, and what its own server asks of others: the same login and certificates."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from harmonylite.config.model import Config


class SettingsError(ValueError):
    """The settings contradict each other or a file they name cannot be used; the text is one line for operators."""


class _Fields(TypedDict):
    user_name: str
    user_password: str
    seed_file: str
    ca_file: str
    cert_file: str
    key_file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """The `[nats]` settings of that; empty texts mean "not set"."""

    user_name: str = ""
    user_password: str = field(default="", repr=False)
    seed_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


def credentials_in(config: Config) -> _Fields:
    """The fields of `Credentials`, for settings that are more than those."""
    nats = config.nats
    return {
        "user_name": nats.user_name,
        "user_password": nats.user_password.reveal(),
        "seed_file": nats.seed_file,
        "ca_file": nats.ca_file,
        "cert_file": nats.cert_file,
        "key_file": nats.key_file,
    }


@dataclass(frozen=True, slots=True)
class Seed:
    """An nkey seed and its public key."""

    seed: str = field(repr=False)
    public_key: str


def read_seed(name: str) -> Seed:
    """The nkey seed in the file `name`: the line that begins with `SU`. Raises SettingsError."""
    try:
        lines = Path(name).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or "it is not text"
        raise SettingsError(f"[nats] seed_file {name} cannot be read: {why}") from None
    seed = next((line for line in lines if line.startswith("SU")), None)
    if seed is None:
        raise SettingsError(f'[nats] seed_file {name} holds no user seed (a line that begins with "SU")')
    try:
        import nkeys
    except ImportError:
        raise SettingsError("[nats] seed_file needs the Python package nkeys, which is not installed") from None
    try:
        pair = nkeys.from_seed(bytearray(seed.encode()))
        return Seed(seed, pair.public_key.decode())
    except Exception:  # nkeys raises its own errors, binascii's and plain ValueError; none may show the seed
        raise SettingsError(f"[nats] seed_file {name} holds a damaged seed") from None
