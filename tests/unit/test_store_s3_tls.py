"""S3 over TLS: both clients trust the same authorities, and what is wrong with a certificate is said."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fakes3
import pytest
import s3servers
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

BODY = b"content"
LISTING = b"""<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key><Size>7</Size>
<ETag>"e"</ETag><LastModified>2026-11-23T03:00:00.000Z</LastModified></Contents></ListBucketResult>"""
READ = """
import sys
from tierfs.store.base import Capabilities
from tierfs.store.s3 import S3Settings, S3Store
store = S3Store(S3Settings("bucket", "", sys.argv[1]), Capabilities(client=sys.argv[2]))
for call in (lambda: bytes(store.get("a")), lambda: [info.key for info in store.list("")]):
    try:
        print(call())
    except Exception as error:
        print(error)
"""


def certificate(name: str, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None):
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    by, signing = (issuer[0].subject, issuer[1]) if issuer else (subject, key)
    made = (
        x509.CertificateBuilder(by, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer:
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        made = made.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    return made.sign(signing, hashes.SHA256()), key


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """The file of an authority; beside it the certificate and key of a server that it has signed."""
    signer = certificate("an authority of one's own", None)
    signed, key = certificate("localhost", signer)
    pem = serialization.Encoding.PEM
    raw = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "server.pem").write_bytes(raw + signed.public_bytes(pem))
    (tmp_path / "authority.pem").write_bytes(signer[0].public_bytes(pem))
    return tmp_path / "authority.pem"


@pytest.fixture
def endpoint(authority: Path) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.with_name("server.pem"))
    with fakes3.serve(context) as server:
        server.answer = lambda request: (
            fakes3.Answer(200, LISTING) if "list-type" in request.path else fakes3.content(BODY, request)
        )
        yield server.endpoint


def read(endpoint: str, client: str, **env: str) -> list[str]:
    """What a process says that reads an object and lists the bucket."""
    left = {name: value for name, value in os.environ.items() if name not in ("SSL_CERT_FILE", "AWS_CA_BUNDLE")}
    done = subprocess.run(
        [sys.executable, "-c", READ, endpoint, client], env=left | s3servers.credentials() | env,
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.parametrize("client", ["obstore", "boto3"])
@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_one_variable_is_enough_for_both(authority: Path, endpoint: str, client: str, variable: str) -> None:
    assert read(endpoint, client, **{variable: str(authority)}) == [str(BODY), "['a']"]


@pytest.mark.parametrize("client", ["obstore", "boto3"])
def test_a_certificate_that_nobody_vouches_for_is_named_with_the_remedy(endpoint: str, client: str) -> None:
    said = read(endpoint, client)
    assert len(said) == 2
    for line in said:
        assert "the server's certificate is not trusted" in line and "AWS_CA_BUNDLE" in line
