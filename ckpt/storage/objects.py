"""Writing to object stores: conditional puts, uploads in parts that go on where they were cut short, checksums.

An object is there whole or not at all. Knows no checkpoints; reading, retries and errors are ckpt_formats.remote's.
What only S3 has (parts that survive a restart, checksums that the store verifies, metadata) is used through s3fs; other
file systems get whole objects.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import logging
import os
import secrets
import zlib
from typing import Any, NamedTuple

from ckpt_formats.backends import brief
from ckpt_formats.errors import ConfigurationError, StoreError
from ckpt_formats.native import names
from ckpt_formats.remote import PAUSES_S, REQUEST_TIMEOUT_S, Entry, Store, response
from ckpt_formats.urls import normal

__all__ = ["PART", "ObjectStore", "Upload"]

PART = 8 << 20
"""Bytes of a part of an upload, unless there would be more than MAX_PARTS of them."""
MAX_PARTS = 9_000
"""S3 takes 10,000."""
SLOWEST = 64 << 10
"""Bytes per second that a link must manage."""
CONTENTS = "anyckpt-contents"
"""The key of an object's metadata that says what its bytes are."""
_SOON_S = (0.2, 0.5)
"""Pauses between attempts of `check`, whose caller waits for it."""
_SOON_LIMIT_S = 12.0
"""Seconds that each of them may take."""

log = logging.getLogger("ckpt.store")

_PROBE = b"anyckpt tries whether this store is fit for checkpoints"


class _Traits(NamedTuple):
    exclusive: bool
    """It honours conditional puts."""
    md5: bool
    """The entity tag that it gives to what it was sent is the MD5 of the bytes that arrived."""


_known: dict[str, _Traits] = {}
"""By bucket."""


class ObjectStore(Store):
    """A store that is written to; what Store says of errors holds here too."""

    def __init__(
        self,
        url: str | os.PathLike[str],
        pauses: tuple[float, ...] = PAUSES_S,
        limit: float = REQUEST_TIMEOUT_S,
    ) -> None:
        super().__init__(normal(url), pauses, limit)
        self.s3 = self.scheme in ("s3", "s3a")

    def check(self) -> bool:
        """Try, before a training relies on it, that objects below the URL can be listed, written, read and removed.

        Returns whether the store honours conditional puts, so that of two that commit the same checkpoint one wins.

        Raises:
            StoreError: the bucket is missing, the credentials are wrong or missing or allow too little, or the
                endpoint can't be reached. Found out within seconds, or a minute when the endpoint is silent.
            ConfigurationError: the store's library does not know an option.
        """
        soon = ObjectStore(self.url, _SOON_S, _SOON_LIMIT_S)
        probe = os.path.join(self.url, names.temporary("probe", secrets.token_hex(8)))
        try:
            exclusive = soon._try(probe).exclusive
            if soon.read(probe) != _PROBE:
                why = f"{self.url}: what was written there can't be read again; use another store"
                raise StoreError(why, path=probe)
            listed: list[Entry] = []
            with contextlib.suppress(FileNotFoundError):
                listed = soon.ls(self.url)
            if not any(entry.name == os.path.basename(probe) for entry in listed):
                raise StoreError(f"{self.url}: what was written there is not listed; use another store", path=probe)
        except TypeError as error:
            raise ConfigurationError(
                f"{self.url}: its options are not all known ({brief(error)}); correct them"
            ) from error
        except BaseException:
            # once: whoever waits has waited for as long as may help
            with contextlib.suppress(StoreError):
                ObjectStore(self.url, (), _SOON_LIMIT_S).remove(probe)
            raise
        soon.remove(probe)
        return exclusive

    @property
    def exclusive(self) -> bool:
        """Whether the store honours conditional puts; tried once per bucket and process."""
        return self._traits().exclusive

    def _traits(self) -> _Traits:
        known = _known.get(self._bucket)
        if known is None:
            probe = os.path.join(self.url, names.temporary("probe", secrets.token_hex(8)))
            try:
                known = self._try(probe)
            finally:
                with contextlib.suppress(StoreError):
                    self.remove(probe)
        return known

    def _try(self, probe: str) -> _Traits:
        """Find out about the store with an object, which is left there."""
        answer = self.attempt(probe, lambda: self._pipe(probe, _PROBE, {}))
        md5 = isinstance(answer, dict) and _tag(answer) == _md5(_PROBE)
        try:
            self.attempt(probe, lambda: self._pipe(probe, _PROBE, {"mode": "create"}))
            exclusive = False
        except FileExistsError:
            exclusive = True
        except (NotImplementedError, TypeError):
            exclusive = False
        except StoreError as error:
            if response(error.__cause__)[0] not in (400, 405, 501):
                raise
            exclusive = False  # it does not know the condition
        known = _known.get(self._bucket)
        if not exclusive and (known is None or known.exclusive):
            log.warning(
                "%s: the store does not honour conditional puts (If-None-Match), so a commit looks first whether "
                "another checkpoint is there; no two jobs may save to the same place at the same time",
                self._bucket,
            )
        _known[self._bucket] = known = _Traits(exclusive, md5)
        return known

    @property
    def _bucket(self) -> str:
        return "/".join(self.url.split("/")[:3])

    def put(self, url: str, data: bytes) -> None:  # with a checksum, where the store takes one
        self.attempt(url, lambda: self._require_arrived(url, data, self._pipe(url, data, {})))

    def create(self, url: str, data: bytes) -> bool:
        """Have a new object with these bytes; False if another one is there, which stays. The commit of a checkpoint.

        Atomic on stores that honour conditional puts (`exclusive`). After an answer that was lost, what is there is
        read: the very bytes mean that it is done.
        """
        if not self.exclusive:
            there = self._content(url)
            if there is None:
                self.put(url, data)
                there = self._content(url)
            return there == data
        try:
            answer = self.attempt(url, lambda: self._pipe(url, data, {"mode": "create"}))
        except FileExistsError:
            return self._content(url) == data
        try:
            self._require_arrived(url, data, answer)
        except OSError:
            self.put(url, data)  # the name is ours
        return True

    def _content(self, url: str) -> bytes | None:
        try:
            return self.read(url)
        except FileNotFoundError:
            return None

    def _pipe(self, url: str, data: bytes, options: dict[str, Any]) -> Any:
        """One attempt to have a small object. Returns the store's answer. Raises FileExistsError if told to create."""
        if self.s3:
            # one put, however large: its checksum is then of all bytes
            options = options | {"chunksize": 5 << 30, "ChecksumCRC32": checksum(data)}
        limit = max(self.limit, len(data) / SLOWEST)
        try:
            return self.do("pipe_file", self.key(url), data, limit=limit, **options)
        except OSError as error:
            if response(error)[0] == 412:
                raise FileExistsError(url) from error
            raise

    def _require_arrived(self, url: str, data: bytes, answer: Any) -> None:
        """Raise OSError if the store says that it got other bytes: not all look at the checksum that they get."""
        if self._traits().md5 and isinstance(answer, dict) and _tag(answer) not in ("", _md5(data)):
            raise OSError(errno.EIO, "the bytes were damaged on their way to the store", url)

    def send(self, url: str, operation: str, data: bytes, **parameters: Any) -> dict[str, Any]:
        """An operation of S3 that sends bytes, with retries, until they have arrived."""
        limit = max(self.limit, len(data) / SLOWEST)
        crc = checksum(data)

        def call() -> dict[str, Any]:
            answer = self.do("call_s3", operation, limit=limit, Body=data, ChecksumCRC32=crc, **parameters)
            self._require_arrived(url, data, answer)
            return dict(answer)

        return self.attempt(url, call)

    def upload(self, url: str, size: int, contents: str) -> Upload:
        """Begin to write a large object, or go on with it.

        Args:
            size: its bytes in all.
            contents: what says what they are: another object of that name with the same `contents` has the same bytes.
        """
        return _S3Upload(self, url, size, contents) if self.s3 else Upload(self, url, size, contents)

    def copy(self, source: str, target: str, size: int) -> None:
        """Have a copy of an object of `size` bytes, made by the store itself. Raises FileNotFoundError."""
        limit = max(self.limit, size / SLOWEST)
        self.attempt(source, lambda: self.do("cp_file", self.key(source), self.key(target), limit=limit))

    def abandoned(self) -> dict[str, float]:
        """Uploads below the URL that began and did not end, which take room unseen: object's URL to when it began."""
        return {self._url_of(item["Key"]): item["Initiated"].timestamp() for item in self.uploads(self.url + "/")}

    def abandon(self, url: str) -> None:
        """Give up the uploads of an object that did not end."""
        bucket, key = self.split(url)
        for item in self.uploads(url):
            if item["Key"] == key:
                self.call(url, "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=item["UploadId"])

    def uploads(self, prefix: str) -> list[dict[str, Any]]:
        """Uploads that did not end of objects whose URLs begin with this."""
        if not self.s3:
            return []
        bucket, key = self.split(prefix)
        found: list[dict[str, Any]] = []
        marker: dict[str, str] = {}
        while True:
            try:
                page = self.call(prefix, "list_multipart_uploads", Bucket=bucket, Prefix=key, **marker)
            except FileNotFoundError:
                return found  # rclone's way to say that there are none
            except StoreError as error:
                if response(error.__cause__)[0] in (403, 405, 501):
                    return found  # who may not see them does without
                raise
            found += page.get("Uploads", [])
            if not page.get("IsTruncated"):
                return found
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def split(self, url: str) -> tuple[str, str]:
        """Bucket and key of a URL."""
        bucket, _, key = url.partition("://")[2].partition("/")
        return bucket, key

    def _url_of(self, key: str) -> str:
        return f"{self._bucket}/{key}"

    def call(self, url: str, operation: str, **parameters: Any) -> dict[str, Any]:
        """An operation of S3, with retries."""
        answer: dict[str, Any] = self.attempt(url, lambda: self.do("call_s3", operation, **parameters))
        return answer


class Upload:
    """A large object on its way, part after part; there when it is finished. Here by the file system's own means.

    Attributes:
        url: the object's.
        part: bytes of each part but the last.
        ordered: whether parts must be sent one after the other.
    """

    ordered = True

    def __init__(self, store: ObjectStore, url: str, size: int, contents: str) -> None:
        self.url = url
        self.size = size
        self.part = max(PART, -(-size // MAX_PARTS // 4096) * 4096)
        self._store = store
        self._contents = contents
        self._file: Any = None

    def is_there(self) -> bool | None:
        """Whether the object is there with its contents; None if it is of that size and the store can't tell."""
        try:
            return None if self._store.size(self.url) == self.size else False
        except FileNotFoundError:
            return False

    def begin(self) -> None:
        """Before the first part is sent."""

    def send(self, number: int, data: bytes) -> bool:
        """Send part `number`, from 0. Whether that was needed: it may be there from before."""
        if self.size <= self.part:
            self._store.put(self.url, data)
            return True
        store = ObjectStore(self.url, ())  # what was written to a stream can't be written again
        if number == 0:
            self._file = store.attempt(self.url, lambda: store.system.open(store.key(self.url), "wb"))
        store.attempt(self.url, lambda: self._file.write(data))
        return True

    def finish(self) -> None:
        """Make the object of its parts, in place of one of that name. Raises StoreError if it has another size."""
        if self._file is not None:
            ObjectStore(self.url, ()).attempt(self.url, self._file.close)
        self._require_size()

    def stop(self, *, for_good: bool) -> None:  # noqa: ARG002 - what was sent is of no use to anybody
        """Send no more of it. What a later upload may go on with stays, unless it is given up for good."""
        file, self._file = self._file, None
        # closing it would publish what it has
        if file is not None and hasattr(file, "discard"):
            with contextlib.suppress(StoreError):
                ObjectStore(self.url, ()).attempt(self.url, file.discard)

    def _require_size(self) -> None:
        size = self._store.size(self.url)
        if size != self.size:
            why = f"{self.url}: the store has {size} of the {self.size} bytes that it was given; try again"
            raise StoreError(why, path=self.url)


class _S3Upload(Upload):
    """By the multipart upload of S3, which remembers the parts that it has when whoever sent them is gone."""

    ordered = False

    def __init__(self, store: ObjectStore, url: str, size: int, contents: str) -> None:
        super().__init__(store, url, size, contents)
        bucket, key = store.split(url)
        self._about: dict[str, Any] = {"Bucket": bucket, "Key": key}
        self._id: str | None = None
        self._there: dict[int, dict[str, Any]] = {}
        self._sent: dict[int, dict[str, Any]] = {}

    def is_there(self) -> bool | None:
        try:
            head = self._store.call(self.url, "head_object", **self._about)
        except FileNotFoundError:
            return False
        if head["ContentLength"] != self.size:
            return False
        said = head.get("Metadata", {}).get(CONTENTS)
        return None if said is None else said == self._contents

    def begin(self) -> None:
        """Go on with the last upload that did not end, or begin one."""
        if self.size <= self.part:
            return
        open_ones = [item for item in self._store.uploads(self.url) if item["Key"] == self._about["Key"]]
        for item in sorted(open_ones, key=lambda item: str(item.get("Initiated")), reverse=True):
            try:
                self._there = self._parts_of(item["UploadId"])
            except FileNotFoundError:
                continue  # ended meanwhile
            self._id = item["UploadId"]
            return
        metadata = {CONTENTS: self._contents}
        answer = self._store.call(
            self.url, "create_multipart_upload", **self._about, Metadata=metadata, ChecksumAlgorithm="CRC32"
        )
        self._id = answer["UploadId"]

    def _parts_of(self, upload: str) -> dict[int, dict[str, Any]]:
        parts: dict[int, dict[str, Any]] = {}
        marker: dict[str, int] = {}
        while True:
            page = self._store.call(self.url, "list_parts", **self._about, UploadId=upload, **marker)
            parts |= {item["PartNumber"]: item for item in page.get("Parts", [])}
            if not page.get("IsTruncated"):
                return parts
            marker = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def send(self, number: int, data: bytes) -> bool:
        if self.size <= self.part:
            self._store.send(self.url, "put_object", data, **self._about, Metadata={CONTENTS: self._contents})
            return True
        there = self._there.get(number + 1)
        if there is not None and _is(there, data):
            self._sent[number + 1] = there
            return False
        about = self._about | {"UploadId": self._id, "PartNumber": number + 1}
        self._sent[number + 1] = self._store.send(self.url, "upload_part", data, **about)
        return True

    def stop(self, *, for_good: bool) -> None:
        if for_good and self._id is not None:
            with contextlib.suppress(FileNotFoundError, StoreError):
                self._store.abandon(self.url)

    def finish(self) -> None:
        if self.size > self.part:
            parts = [
                {"PartNumber": number}
                | {key: part[key] for key in ("ETag", "ChecksumCRC32") if part.get(key) is not None}
                for number, part in sorted(self._sent.items())
            ]
            about = self._about | {"UploadId": self._id}
            # not found: it was done and the answer was lost; else the size tells
            with contextlib.suppress(FileNotFoundError):
                self._store.call(self.url, "complete_multipart_upload", **about, MultipartUpload={"Parts": parts})
        try:
            self._require_size()
        except FileNotFoundError as error:
            raise StoreError(f"{self.url}: the store lost the parts of the object; try again", path=self.url) from error


def checksum(data: bytes) -> str:
    """CRC-32 as S3 wants it, so that the store refuses what was damaged on the way."""
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode("ascii")


def _is(part: dict[str, Any], data: bytes) -> bool:
    """Whether a part that the store has is this one."""
    return bool(part.get("Size") == len(data)) and (
        _tag(part) == _md5(data) or (part.get("ChecksumCRC32") is not None and part["ChecksumCRC32"] == checksum(data))
    )


def _tag(answer: dict[str, Any]) -> str:
    return str(answer.get("ETag") or "").strip('"')


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
