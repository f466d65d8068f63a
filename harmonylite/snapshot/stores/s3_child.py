"""The process that speaks S3: botocore costs some 30 MB, which the daemon does not have to spare all the time.

    python -m harmonylite.snapshot.stores.s3_child

One request comes as a line of JSON on standard input, which then stays open: its end means that the parent is gone.
Answers go to standard output, one JSON object a line: {"alive"}, {"progress"}, {"log"}, {"manifest"}, and at the
end {"done"} or {"error"}.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores.base import StoreError, StoreRefused

# How often the parent hears that bytes move.
ALIVE_EVERY_S = 0.5
_PR_SET_PDEATHSIG = 1


class Answers:
    """Standard output as the parent reads it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0.0

    def say(self, **answer: Any) -> None:
        line = json.dumps(answer)
        with self._lock:
            self._last = time.monotonic()
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def alive(self) -> None:
        if time.monotonic() - self._last >= ALIVE_EVERY_S:
            self.say(alive=True)

    def progress(self, done: int) -> None:
        self.say(progress=done)


class _LogLines(logging.Handler):
    """Our own log goes to the parent, which writes it."""

    def __init__(self, answers: Answers) -> None:
        super().__init__(logging.WARNING)
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        self._answers.say(log=record.getMessage(), fields=getattr(record, "fields", {}))


def main() -> int:
    """Read one request, do it, say how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answers = Answers()
    try:
        request = json.loads(sys.stdin.readline())
    except ValueError:  # the parent died while it wrote, or is somebody else
        return 2
    _die_with(int(request["parent"]))
    logging.getLogger("harmonylite").addHandler(_LogLines(answers))
    try:
        result = _do(request, answers)
    except StoreError as error:
        answers.say(error=type(error).__name__, message=str(error))
        return 1
    answers.say(done=result)
    return 0


def _do(request: dict[str, Any], answers: Answers) -> Any:
    try:
        from harmonylite.snapshot.stores.s3_bucket import Bucket, Place, bound_send_buffers
        from harmonylite.snapshot.stores.s3_service import Service
    except ModuleNotFoundError as error:
        raise StoreRefused(
            f"S3 needs boto3 ({error}): apt install python3-boto3, or in a virtual environment pip install boto3"
        ) from None
    bound_send_buffers()
    service = Service(Bucket(Place(**request["place"]), answers.alive), answers.alive, answers.progress)
    manifest = Manifest.from_json(request["manifest"].encode()) if "manifest" in request else None
    operation = request["operation"]
    if operation == "list":
        for found in service.list():
            answers.say(manifest=found.to_json().decode())
    elif operation == "upload" and manifest is not None:
        service.upload(manifest, Path(request["path"]))
    elif operation == "download" and manifest is not None:
        service.download(manifest, Path(request["path"]), request["offset"])
    elif operation == "delete":
        service.delete(request["id"])
    elif operation == "prune":
        return service.prune(request["retain"], request["abandoned_s"])
    else:
        raise StoreRefused(f"no such operation: {operation}")
    return None


def _die_with(parent: int) -> None:
    """End when the parent does: by its signal, and by the end of standard input should that not come."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(2)

    def watch() -> None:
        # Not sys.stdin: the interpreter cannot end while a thread waits in it.
        while os.read(0, 4096):
            pass
        os._exit(2)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
