"""`python -m harmonylite` is the `harmonylite` command."""

from harmonylite.cli.main import entry

if __name__ == "__main__":
    entry()
