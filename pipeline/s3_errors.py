"""What S3's SDK, its connections and its servers raise, as errors of ours: what may pass by itself, and what a user must mend."""

from __future__ import annotations

import aiohttp
from botocore import exceptions as sdk
from botocore.parsers import ResponseParserError

from pipeline.errors import InputMissing, NightlabelError, PermissionDenied, StoreError, Unidentified

#: No answer, half of one, or one that was damaged.
INTERRUPTED = (
    *(sdk.HTTPClientError, sdk.ConnectionError, ResponseParserError, sdk.IncompleteReadError),
    *(sdk.FlexibleChecksumError, aiohttp.ClientError, OSError),
)
_UNIDENTIFIED = (
    *(sdk.NoCredentialsError, sdk.PartialCredentialsError, sdk.CredentialRetrievalError, sdk.ProfileNotFound),
    *(sdk.TokenRetrievalError, sdk.NoAuthTokenError),
)
#: Keys that are none any more: a profile, a file or a role may have others by now.
_STALE_CODES = frozenset(
    {
        *("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"),
        *("InvalidClientTokenId", "UnrecognizedClientException"),
    }
)
#: Credentials that came and are not taken; an AccessDenied is of known ones, and may be of one object alone.
_UNIDENTIFIED_CODES = _STALE_CODES | {
    *("InvalidSecurity", "SignatureDoesNotMatch", "RequestTimeTooSkewed", "RequestExpired", "NotSignedUp", "AccountProblem"),
}
_THROTTLED_CODES = frozenset(
    {
        *("SlowDown", "Throttling", "ThrottlingException", "ThrottledException", "TooManyRequestsException"),
        *("RequestLimitExceeded", "RequestThrottled", "RequestThrottledException", "BandwidthLimitExceeded"),
    }
)
#: A body that came late, in part or damaged; a conditional create beside another one of the same key.
_TEMPORARY_CODES = _THROTTLED_CODES | {
    *("RequestTimeout", "RequestTimeoutException", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),
    *("PriorRequestNotComplete", "ConditionalRequestConflict", "OperationAborted"),
}
_REGION_CODES = frozenset(
    {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
_FULL_CODES = frozenset({"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "StorageCapExceeded"})


def status(error: Exception) -> int:
    """The HTTP status of an answer, 0 for what was none."""
    answer = error.response if isinstance(error, sdk.ClientError) else {}
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: Exception) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, sdk.ClientError) else ""


def is_temporary(error: Exception) -> bool:
    """May the same request succeed later?"""
    if _code(error) in _FULL_CODES:
        return False
    if isinstance(error, sdk.ClientError):  # 409: another conditional create of the same key is under way; 499: nginx, MinIO
        got = status(error)
        return (got >= 500 and got != 501) or got in (408, 409, 425, 429, 499) or _code(error) in _TEMPORARY_CODES
    return isinstance(error, INTERRUPTED) and not isinstance(error, sdk.SSLError)


def is_throttled(error: Exception) -> bool:
    """Is the server there and asks for patience?"""
    return status(error) == 429 or _code(error) in _THROTTLED_CODES


def is_stale(error: Exception) -> bool:
    """May other credentials be found where these came from, a file that was written anew or a service that did not answer?"""
    return isinstance(error, _UNIDENTIFIED) or _code(error) in _STALE_CODES


def said(error: Exception) -> str:
    """What it says, in a few words."""
    if isinstance(error, sdk.ClientError):
        return f"{_code(error)}, {error.response.get('Error', {}).get('Message')}".rstrip(".")
    return (str(error) or str(error.__cause__) or type(error).__name__).rstrip(".")  # fsspec's timeout says nothing itself


def explanation(error: Exception, uri: str, writing: bool) -> NightlabelError:
    """What no second try mends, as an error that a user can act on."""
    text, code = said(error), _code(error)
    if isinstance(error, _UNIDENTIFIED):
        do = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role; a public bucket needs s3.anonymous"
        return Unidentified(f"{uri}: {text}", need="credentials for S3", do=do)
    if status(error) == 401 or code in _UNIDENTIFIED_CODES:
        need = "credentials that are known and not expired, and a clock that is right"
        return Unidentified(f"{uri}: {text}", need=need, do="Renew them where the job runs, on every worker, and run again")
    if code == "InvalidObjectState":  # a 403, and no question of rights
        return InputMissing(f"{uri}: {text}", need="an object that can be read at once", do="Restore it from the archive")
    if code in _FULL_CODES:
        do = "Free some space and run again; what is written stays valid"
        return StoreError(f"{uri}: {text}", need="room for the output", do=do)
    if status(error) == 403:
        right = "write" if writing else "read and list"
        return PermissionDenied(f"{uri}: {text}", need=f"the right to {right} there", do="Check the credentials and the policy")
    if status(error) == 404 and not writing:
        return InputMissing(f"{uri}: {text}", need="an existing bucket and object", do="Check the URI")
    return _unfit(error, f"{uri}: {text}", writing)


def _unfit(error: Exception, got: str, writing: bool) -> StoreError:
    """The store cannot do what is asked of it, or not so."""
    if isinstance(error, sdk.SSLError):
        need = "a server whose certificate this machine trusts"
        return StoreError(got, need=need, do="Set AWS_CA_BUNDLE to that of its authority, or mend the endpoint")
    if 300 <= status(error) < 400 or _code(error) in _REGION_CODES:
        assert isinstance(error, sdk.ClientError)
        region = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
        need = f"the bucket's own region{f', {region}' if region else ''}, and the endpoint of that"
        return StoreError(got, need=need, do="Set s3.region, and s3.endpoint if there is one")
    if "checksum" in got.lower() or "TRAILER" in got:
        do = "Set AWS_REQUEST_CHECKSUM_CALCULATION and AWS_RESPONSE_CHECKSUM_VALIDATION to when_required where the job runs"
        return StoreError(got, need="a server that takes S3's checksums, or none of them", do=do)
    if writing and (status(error) == 501 or "if-none-match" in got.lower()):
        need = "a store that creates an object only if it is absent (If-None-Match: *)"
        return StoreError(got, need=need, do="Update the server, or write the output elsewhere")
    return StoreError(got, need="a bucket that can be used", do="Check the URI and the s3 options of the job")
