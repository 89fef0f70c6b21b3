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
#: Credentials that came and are not taken; an AccessDenied is of known ones, and may be of one object alone.
_UNIDENTIFIED_CODES = frozenset(
    {
        *("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"),
        *("InvalidClientTokenId", "UnrecognizedClientException", "InvalidSecurity", "SignatureDoesNotMatch"),
        *("RequestTimeTooSkewed", "RequestExpired", "NotSignedUp", "AccountProblem"),
    }
)
_TEMPORARY_CODES = frozenset({"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"})


def status(error: Exception) -> int:
    """The HTTP status of an answer, 0 for what was none."""
    answer = error.response if isinstance(error, sdk.ClientError) else {}
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: Exception) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, sdk.ClientError) else ""


def is_temporary(error: Exception) -> bool:
    """May the same request succeed later?"""
    if isinstance(error, sdk.ClientError):  # 409: another conditional create of the same key is under way
        got = status(error)
        return (got >= 500 and got != 501) or got in (408, 409, 429) or _code(error) in _TEMPORARY_CODES
    return isinstance(error, INTERRUPTED) and not isinstance(error, sdk.SSLError)


def said(error: Exception) -> str:
    """What it says, in a few words."""
    if isinstance(error, sdk.ClientError):
        return f"{_code(error)}, {error.response.get('Error', {}).get('Message')}".rstrip(".")
    return (str(error) or str(error.__cause__) or type(error).__name__).rstrip(".")  # fsspec's timeout says nothing itself


def explanation(error: Exception, uri: str, writing: bool) -> NightlabelError:
    """What no second try mends, as an error that a user can act on."""
    text = said(error)
    if isinstance(error, _UNIDENTIFIED):
        do = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role; a public bucket needs s3.anonymous"
        return Unidentified(f"{uri}: {text}", need="credentials for S3", do=do)
    if status(error) == 401 or _code(error) in _UNIDENTIFIED_CODES:
        need = "credentials that are known and not expired, and a clock that is right"
        return Unidentified(f"{uri}: {text}", need=need, do="Renew them where the job runs, on every worker, and run again")
    if status(error) == 403:
        right = "write" if writing else "read and list"
        return PermissionDenied(f"{uri}: {text}", need=f"the right to {right} there", do="Check the credentials and the policy")
    if status(error) == 404 and not writing:
        return InputMissing(f"{uri}: {text}", need="an existing bucket and object", do="Check the URI")
    return StoreError(f"{uri}: {text}", need="a bucket that can be used", do="Check the URI and the s3 options of the job")
