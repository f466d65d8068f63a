"""One folder of an S3 bucket: the requests that are made of it. Needs botocore; used by the child process alone.

API: https://docs.aws.amazon.com/AmazonS3/latest/API/Welcome.html
"""

from __future__ import annotations

import contextlib
import email.utils
import io
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import botocore.session
import urllib3.util.connection
from botocore.config import Config
from botocore.exceptions import ClientError

from harmonylite.snapshot.stores.base import CorruptSnapshot, SnapshotMissing, StoreRefused
from harmonylite.snapshot.stores.s3_errors import TRANSPORT_ERRORS, code_of, explain

log = logging.getLogger(__name__)

SEND_BUFFER_BYTES = 256 * 1024
_READ_BYTES = 256 * 1024
_AWS_REGION = re.compile(r"(?:^|\.)s3[.-]([a-z]{2}(?:-[a-z]+)+-\d)\.amazonaws\.com")
_DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True, slots=True)
class Place:
    """Which bucket, and how to get there. Empty strings: what botocore finds itself, or its default.

    attempts: of one request, the first included.
    """

    endpoint: str
    region: str
    bucket: str
    folder: str
    use_ssl: bool
    access_key: str
    secret: str
    session_token: str
    connect_timeout_s: float
    read_timeout_s: float
    attempts: int

    def __str__(self) -> str:
        return f"S3 bucket {self.bucket} at {self.endpoint or 'AWS'}"


@dataclass(frozen=True, slots=True)
class Found:
    """An object. size: bytes; modified_s: seconds since 1970, by the service's clock."""

    size: int
    modified_s: float


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload in parts that was begun. begun_s: seconds since 1970, by the service's clock; 0: just now."""

    name: str
    id: str
    begun_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an upload. size: bytes; stored_s: seconds since 1970, by the service's clock; 0: just now."""

    etag: str
    size: int
    stored_s: float = 0.0


class Window(io.RawIOBase):
    """A span of an open file as a file of its own, so that no part is held in memory."""

    def __init__(self, file: BinaryIO, begin: int, length: int, alive: Callable[[], None]) -> None:
        """alive: called at each read, that is while the bytes travel."""
        super().__init__()
        self._descriptor = file.fileno()
        self._begin, self._length, self._at = begin, length, 0
        self._alive = alive

    def __len__(self) -> int:
        return self._length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._alive()
        wanted = min(len(buffer), self._length - self._at)
        if wanted <= 0:
            return 0
        data = os.pread(self._descriptor, wanted, self._begin + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Bucket:
    """Names are relative to the folder. Methods raise StoreError."""

    def __init__(self, place: Place, alive: Callable[[], None]) -> None:
        """alive: called between requests of a long series."""
        self.now_s = time.time()  # the service's clock, once `objects` was called
        self._where = str(place)
        self._alive = alive
        self._bucket = place.bucket
        folder = place.folder.strip("/")
        self._prefix = f"{folder}/" if folder else ""
        with self._explained():
            self._s3 = _client(place)

    def __str__(self) -> str:
        return self._where

    def objects(self, beginning: str = "") -> dict[str, Found]:
        """The objects whose names begin so."""
        found: dict[str, Found] = {}
        with self._explained():
            for page in self._pages("list_objects_v2", Prefix=self._prefix + beginning):
                for item in page.get("Contents", ()):
                    name = item["Key"].removeprefix(self._prefix)
                    found[name] = Found(int(item["Size"]), item["LastModified"].timestamp())
        return found

    def get(self, name: str, most: int) -> bytes:
        """A small object: its first `most` bytes. Raises SnapshotMissing."""
        with self._explained():
            answer = self._s3.get_object(Bucket=self._bucket, Key=self._prefix + name)
            data: bytes = answer["Body"].read(most)
            return data

    def read(self, name: str, offset: int, size: int) -> Iterator[bytes]:
        """An object of `size` bytes from `offset` on. When it breaks, raises TRANSPORT_ERRORS as they are.

        Raises SnapshotMissing, or CorruptSnapshot if it has another size.
        """
        try:
            answer = self._s3.get_object(Bucket=self._bucket, Key=self._prefix + name, Range=f"bytes={offset}-")
        except ClientError as error:
            if code_of(error) in ("InvalidRange", "416"):
                raise CorruptSnapshot(f"{name} in {self._where} ends before byte {offset}") from None
            raise explain(error, self._where) from None
        total = str(answer.get("ContentRange", "")).rpartition("/")[2]
        if offset and not total:
            raise StoreRefused(f"{self._where} cannot answer with a range of an object")
        if total.isdigit() and int(total) != size:
            raise CorruptSnapshot(f"{name} in {self._where} has {total} bytes, not {size}")
        yield from answer["Body"].iter_chunks(_READ_BYTES)

    def put(self, name: str, data: bytes | Window) -> None:
        """Store an object in one request."""
        with self._explained():
            self._s3.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data)

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""
        with self._explained(), contextlib.suppress(SnapshotMissing):
            self._s3.delete_object(Bucket=self._bucket, Key=self._prefix + name)

    def uploads(self, beginning: str = "") -> list[Upload]:
        """The uploads in parts under way, of names that begin so; none if this user may not ask."""
        try:
            with self._explained():
                return [
                    Upload(item["Key"].removeprefix(self._prefix), item["UploadId"], item["Initiated"].timestamp())
                    for page in self._pages("list_multipart_uploads", Prefix=self._prefix + beginning)
                    for item in page.get("Uploads", ())
                ]
        except StoreRefused as error:
            log.warning("uploads under way cannot be listed, none is resumed", extra={"fields": {"error": str(error)}})
            return []

    def begin(self, name: str) -> Upload:
        """Begin an upload in parts."""
        with self._explained():
            answer = self._s3.create_multipart_upload(Bucket=self._bucket, Key=self._prefix + name)
        return Upload(name, answer["UploadId"])

    def parts(self, upload: Upload) -> dict[int, Part]:
        """What is stored of an upload, by part number."""
        with self._explained():
            return {
                int(item["PartNumber"]): Part(item["ETag"], int(item["Size"]), item["LastModified"].timestamp())
                for page in self._pages("list_parts", **self._names(upload))
                for item in page.get("Parts", ())
            }

    def send(self, upload: Upload, number: int, window: Window) -> Part:
        """Store one part."""
        with self._explained():
            answer = self._s3.upload_part(**self._names(upload), PartNumber=number, Body=window)
        return Part(answer["ETag"], len(window))

    def complete(self, upload: Upload, parts: Mapping[int, Part]) -> None:
        """Make one object of all parts."""
        listed: Sequence[object] = [{"PartNumber": number, "ETag": parts[number].etag} for number in sorted(parts)]
        with self._explained():
            self._s3.complete_multipart_upload(**self._names(upload), MultipartUpload={"Parts": listed})

    def abort(self, upload: Upload) -> None:
        """Drop an upload and its parts; nothing happens if there is none."""
        try:
            with self._explained():
                self._s3.abort_multipart_upload(**self._names(upload))
        except SnapshotMissing:
            return

    def _names(self, upload: Upload) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + upload.name, "UploadId": upload.id}

    def _pages(self, operation: str, **arguments: str) -> Iterator[dict[str, Any]]:
        for page in self._s3.get_paginator(operation).paginate(**{"Bucket": self._bucket, **arguments}):
            self._alive()
            date = page.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
            if date:
                with contextlib.suppress(ValueError):
                    self.now_s = email.utils.parsedate_to_datetime(date).timestamp()
            yield page

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (ClientError, ValueError, *TRANSPORT_ERRORS) as error:
            raise explain(error, self._where) from None


def _client(place: Place) -> Any:
    """A botocore client. Raises ValueError and BotoCoreError for settings that cannot be."""
    options: dict[str, Any] = {
        "connect_timeout": place.connect_timeout_s,
        "read_timeout": place.read_timeout_s,
        "retries": {"mode": "standard", "total_max_attempts": place.attempts},
        "max_pool_connections": 1,
        "user_agent_extra": "harmonylite",
    }
    endpoint = None
    if place.endpoint:
        # A name of the bucket's own (bucket.host) is AWS's alone; other services are reached by address or by one name.
        options["s3"] = {"addressing_style": "path"}
        scheme = "https" if place.use_ssl else "http"
        endpoint = place.endpoint if "://" in place.endpoint else f"{scheme}://{place.endpoint}"
    keys = {
        "aws_access_key_id": place.access_key or None,
        "aws_secret_access_key": place.secret or None,
        "aws_session_token": place.session_token or None,
    }
    session = botocore.session.get_session()
    return session.create_client(
        "s3",
        region_name=_region(place, session),
        endpoint_url=endpoint,
        use_ssl=place.use_ssl or not place.endpoint,
        config=_without_trailing_checksums(options),
        **keys,
    )


def _without_trailing_checksums(options: Mapping[str, Any]) -> Config:
    """botocore 1.36 and later add checksums in a trailer, which other services than AWS may not know."""
    try:
        return Config(
            **options, request_checksum_calculation="when_required", response_checksum_validation="when_required"
        )
    except TypeError:  # an older one does not
        return Config(**options)


def bound_send_buffers() -> None:
    """For this process: no more than SEND_BUFFER_BYTES may wait in the kernel.

    The time for an answer runs from where the kernel has taken a request's last byte. By default it takes 4 MB; over
    a link of 20 kB/s these travel for longer than an answer may take.
    """
    module: Any = urllib3.util.connection
    create = module.create_connection

    def create_bounded(*where: Any, socket_options: Sequence[tuple[int, int, int]] | None = None, **more: Any) -> Any:
        bound = (socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        return create(*where, socket_options=[*(socket_options or ()), bound], **more)

    module.create_connection = create_bounded


def _region(place: Place, session: Any) -> str:
    named = _AWS_REGION.search(place.endpoint)
    found = session.get_config_variable("region") or os.environ.get("AWS_REGION")
    return place.region or (named[1] if named else "") or found or _DEFAULT_REGION
