"""Does what it is told on standard input: one JSON array [function, arguments] per line, one JSON answer per line.

The process and its database connection live as long as the test, as a web server's would.
"""

from __future__ import annotations

import json
import os
import sys
import traceback


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.e2e.django_site.settings")
    import django

    django.setup()
    from tests.e2e.django_site.functions import COMMANDS  # needs the applications to be set up

    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"answer": COMMANDS[name](*arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


main()
