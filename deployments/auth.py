"""API keys: which tenant a request belongs to.

The key file holds no key, only SHA-256 digests: one line `DIGEST TENANT` per key, `#` starts a comment.

    printf %s "$KEY" | sha256sum
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from deployments.errors import ErrorInfo, ServiceError

DEFAULT_TENANT = "default"

_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


class KeyFileError(ValueError):
    """The key file cannot be read as such. The message names the line."""


class ApiKeys:
    """Digest of a key -> tenant. Without keys everyone is the tenant "default"."""

    def __init__(self, tenants: Mapping[str, str] | None = None) -> None:
        self._tenants = {bytes.fromhex(key): name for key, name in (tenants or {}).items()}

    @classmethod
    def load(cls, path: Path) -> ApiKeys:
        """Raises KeyFileError for a malformed line or a file without keys, OSError if unreadable."""
        tenants: dict[str, str] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            words = line.split("#", 1)[0].split()
            if not words:
                continue
            if (
                len(words) != 2
                or not _DIGEST.fullmatch(words[0])
                or not _TENANT.fullmatch(words[1])
            ):
                raise KeyFileError(f"{path}:{number}: expected `sha256-of-key tenant`")
            if words[0] in tenants:
                raise KeyFileError(f"{path}:{number}: this key is listed twice")
            tenants[words[0]] = words[1]
        if not tenants:
            raise KeyFileError(f"{path}: no keys; remove the setting to serve without keys")
        return cls(tenants)

    def tenant(self, authorization: str | None) -> str:
        """Tenant of an `Authorization` header. Raises ServiceError (invalid_api_key)."""
        if not self._tenants:
            return DEFAULT_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            message = "Send the key as `Authorization: Bearer KEY`."
            raise ServiceError(ErrorInfo("invalid_api_key", message))
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogatepass")).digest()
        found = ""
        # Every digest is compared, so that the time taken says nothing about which one matched.
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        if not found:
            raise ServiceError(ErrorInfo("invalid_api_key", "This API key is not known."))
        return found
