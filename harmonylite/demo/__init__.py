"""`harmonylite demo`: three nodes in a temporary folder, converging before your eyes.

`story` tells it and checks it; `fleet` runs real daemons, `link` is the network that gets cut, `shop` is the
application, which knows nothing but its SQLite file; `screen` prints.
"""

from harmonylite.demo.story import main

__all__ = ["main"]
