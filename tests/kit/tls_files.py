"""A certificate for localhost, its key, and files that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from chat import NO_IDLE

#: Made for these tests, for this machine's own names, and trusted by nobody else.
CERT = """\
-----BEGIN CERTIFICATE-----
MIIBhTCCASygAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlPQ1AgdGVz
dHMwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CU9DUCB0ZXN0czBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABPe6QyJIEAhP8vQQ
epyV1bKNYN/mlceitITBU09Jfzv533hRN2Rd07Tz+Z6nY7VKNPa3DT0IkD/GiUM/
Ho8x/RSjbTBrMCwGA1UdEQQlMCOCCWxvY2FsaG9zdIcEfwAAAYcQAAAAAAAAAAAA
AAAAAAAAATAPBgNVHRMBAf8EBTADAQH/MAsGA1UdDwQEAwIChDAdBgNVHQ4EFgQU
dac60beuU9UFWAni91MPP7rMDlIwCgYIKoZIzj0EAwIDRwAwRAIga0RWz9G6D/9B
x5VhmVcIngj8SneD2ieFoAo2HMR5/5QCIEtqBwoQleNLZFm+qAGqpigPxcprjvrP
XLgxkWEs2wP1
-----END CERTIFICATE-----
"""
#: What `ocp tls --show` calls it.
FINGERPRINT = "SHA256:+aDeW2YU0IIjmbyo+xWD0qM0heWmbDcPLGaTyicSE/4="
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQggXQCh5cWtS66Wxa4
7s3sVdk6KGupgc6wf4edONGblx+hRANCAAT3ukMiSBAIT/L0EHqcldWyjWDf5pXH
orSEwVNPSX87+d94UTdkXdO08/mep2O1SjT2tw09CJA/xolDPx6PMf0U
-----END PRIVATE KEY-----
"""


def write_tls_files(
    folder: Path, cert: Optional[str] = CERT, key: Optional[str] = KEY
) -> dict[str, str]:
    """Files with this in them, and the settings that name them; None = there is no file."""
    for name, content in (("cert.pem", cert), ("key.pem", key)):
        if content is not None:
            (folder / name).write_text(content)
    return {**NO_IDLE, "OCP_TLS_CERT": str(folder / "cert.pem"),
            "OCP_TLS_KEY": str(folder / "key.pem")}
