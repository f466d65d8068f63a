"""`snapshot`: what is refused before anything is done, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmonylite.cli.main import main
from harmonylite.cli.screen import Screen


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(
        f'db_path = "{tmp_path / "app.db"}"\nnode_id = 1\n[snapshot]\nstore = "file"\n'
        f'[snapshot.file]\npath = "{tmp_path / "share"}"\n'
    )
    (tmp_path / "share").mkdir()
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["save", "--to", "x"], 2, "takes no --to"),
        (["list", "--force"], 2, "takes no --force"),
        (["save", "--id", "x"], 2, "takes no --id"),
        (["save", "--mirror"], 2, "takes no --mirror"),
        (["remove"], 2, "invalid choice"),
        ([], 2, "needs one of save, list, restore, for example: harmonylite snapshot save"),
        (["save"], 1, "no daemon runs"),
        (["list", "--mirror"], 1, "there is no mirror"),
        (["restore", "--to", "/nowhere/at/all.db"], 1, "no such folder"),
        (["restore"], 1, "holds no snapshot"),
    ],
)
def test_one_line_says_what_is_wrong(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str
) -> None:
    assert main(["snapshot", *arguments, "--config", str(config)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert says in line
    assert not (config.parent / "app.db").exists()


def test_switched_off(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text().replace("[snapshot]", "[snapshot]\nenabled = false"))
    assert main(["snapshot", "list", "--config", str(config)]) == 1
    assert "switched off" in capsys.readouterr().err


def test_an_empty_store_is_no_mistake(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshot", "list", "--config", str(config)]) == 0
    assert capsys.readouterr().out == "the store holds no snapshot yet\n"
    assert main(["snapshot", "list", "--json", "--config", str(config)]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_a_store_that_is_away_now_is_not_tried_again_by_a_command(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("botocore", reason="no boto3: install harmonylite[s3]")
    s3 = '[snapshot.s3]\nendpoint = "127.0.0.1:1"\nbucket = "b"\naccess_key = "a"\nsecret = "s"\n'
    config.write_text(config.read_text().replace('store = "file"', 'store = "file"\nmirror = "s3"') + s3)
    assert main(["snapshot", "list", "--mirror", "--config", str(config)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "cannot be reached" in line
    assert line.endswith("; try again later")


def test_progress_is_for_terminals_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Screen() as screen:
        screen.progress("fetching")(1_000_000, 2_000_000)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Screen() as screen:
        screen.progress("fetching")(2_000_000, 2_000_000)
    shown = capsys.readouterr().err
    assert "fetching: 2.0 of 2.0 MB, 100 %" in shown
    assert shown.endswith("\r"), "the line is left empty"
