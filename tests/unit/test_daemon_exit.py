"""Exit codes of `run`: 2 keeps systemd from starting the daemon again, so only a wrong configuration may give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harmonylite.cli.main import main
from harmonylite.daemon import Daemon
from harmonylite.stream.credentials import SettingsError


def code_when_start_raises(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, step: str) -> int:
    """The exit code of a daemon whose `step` raises."""
    file = folder / "config.toml"
    file.write_text(f'db_path = "{folder / "app.db"}"\nnode_id = 1\n[nats]\nurls = ["nats://127.0.0.1:9"]\n')

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(Daemon, step, fail)
    return main(["run", "--config", str(file)])


@pytest.mark.parametrize("step", ["__init__", "main"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("[nats] cert_file and key_file belong together"), 2),
        (ValueError("embedded null byte"), 1),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 1),
        (OSError(28, "No space left on device"), 1),
    ],
)
def test_only_a_wrong_configuration_is_2(
    tmp_path: Path, error: Exception, code: int, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_when_start_raises(tmp_path, error, monkeypatch, step) == code
