"""What an error of botocore means for whoever runs HarmonyLite: a StoreError of one line. Needs botocore."""

from __future__ import annotations

from botocore import exceptions
from urllib3.exceptions import HTTPError

from harmonylite.snapshot.stores.base import (
    SnapshotMissing,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
)

# Codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html; services add their own.
_CREDENTIALS = {
    "InvalidAccessKeyId": "does not know this access key: check [snapshot.s3] access_key",
    "SignatureDoesNotMatch": "says that the secret does not belong to the access key: check [snapshot.s3] secret",
    "ExpiredToken": "says that the session token has expired: renew [snapshot.s3] session_token",
    "InvalidToken": "does not accept the session token: check [snapshot.s3] session_token",
    "TokenRefreshRequired": "says that the session token has expired: renew [snapshot.s3] session_token",
    "AccessDenied": "denies access: check [snapshot.s3] access_key; it must list, get, put and delete objects",
    "AllAccessDisabled": "has disabled all access to the bucket",
    "AccountProblem": "has a problem with the account",
    "NoSuchBucket": "does not exist: create it, or correct [snapshot.s3] bucket",
    "InvalidBucketName": "takes no such name for a bucket: correct [snapshot.s3] bucket",
    "PermanentRedirect": "says that the bucket is in another region: set [snapshot.s3] region (and endpoint)",
    "AuthorizationHeaderMalformed": "expects another region: set [snapshot.s3] region",
    "IllegalLocationConstraintException": "says that the bucket is in another region: set [snapshot.s3] region",
}
_FULL = ("QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded")
_BUSY = ("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling", "NoSuchUpload")
_NO_OBJECT = ("NoSuchKey", "404")
_LONGEST_DETAIL = 300

# Whatever botocore and what lies below it may raise while bytes travel.
TRANSPORT_ERRORS = (exceptions.BotoCoreError, HTTPError, OSError)


def code_of(error: exceptions.ClientError) -> str:
    """The service's own code for an error."""
    return str(error.response.get("Error", {}).get("Code", ""))


def explain(error: Exception, where: str) -> StoreError:
    """where: such as `S3 bucket b at host:port`; it begins the line."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, exceptions.ClientError):
        return _refusal(error, where)
    detail = _detail(error)
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return StoreRefused(f"{where}: no credentials: set [snapshot.s3] access_key and secret")
    if isinstance(error, exceptions.SSLError):
        return _tls(error, where, detail)
    if isinstance(error, exceptions.ConnectTimeoutError | exceptions.ReadTimeoutError):
        return StoreUnavailable(f"{where} does not answer in time")
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError | HTTPError):
        return StoreUnavailable(f"{where} cannot be reached, or hung up ({detail})")
    if isinstance(error, exceptions.IncompleteReadError):
        return StoreUnavailable(f"{where} hung up ({detail})")
    if isinstance(error, exceptions.BotoCoreError | ValueError):
        return StoreRefused(f"{where}: {detail}: check [snapshot.s3]")
    return StoreUnavailable(f"{where}: {detail}")


def _refusal(error: exceptions.ClientError, where: str) -> StoreError:
    code = code_of(error)
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    message = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())[:_LONGEST_DETAIL]
    if code in _CREDENTIALS:
        return StoreRefused(f"{where} {_CREDENTIALS[code]}")
    if code == "RequestTimeTooSkewed":
        return StoreUnavailable(f"{where} refuses this device's clock, which is wrong")
    if code in _FULL or status == 507:
        return StoreFull(f"{where} has no room ({code}): lower [snapshot] retain, or enlarge the bucket's quota")
    if code in _NO_OBJECT:
        return SnapshotMissing(f"{where} holds no such snapshot any more")
    if code in _BUSY or status >= 500:
        return StoreUnavailable(f"{where} answers {code} ({status})")
    if status in (401, 403):
        return StoreRefused(f"{where} {_CREDENTIALS['AccessDenied']}")
    return StoreRefused(f"{where} refuses {error.operation_name} with {code} ({status}): {message}")


def _tls(error: Exception, where: str, detail: str) -> StoreError:
    if "CERTIFICATE_VERIFY_FAILED" in detail:
        return StoreRefused(
            f"{where} has a certificate that is not trusted here (AWS_CA_BUNDLE may name the authority)"
        )
    if "WRONG_VERSION_NUMBER" in detail:
        return StoreRefused(f"{where} does not speak TLS: set [snapshot.s3] use_ssl = false, or another port")
    return StoreUnavailable(f"{where} broke off the TLS connection ({detail})")


def _detail(error: Exception) -> str:
    return " ".join(str(error).split())[:_LONGEST_DETAIL] or type(error).__name__
