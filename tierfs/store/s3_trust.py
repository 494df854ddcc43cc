"""Whose certificates an S3 server may show: the same ones to both clients.

obstore goes by the system's list, or by the file that SSL_CERT_FILE names; boto3 by a list that it brings
along, or by AWS_CA_BUNDLE (`ca_bundle` in the AWS configuration). A server at home whose certificate an
authority of one's own has signed would be trusted by one of them alone.
"""

from __future__ import annotations

import os
from typing import Any

_VARIABLE = "SSL_CERT_FILE"
_OF_THE_SYSTEM = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


def trusted(session: Any) -> str | None:
    """The file of authorities for boto3's client, None where it is to use its own; what the AWS configuration
    names is passed on to obstore, by the environment of this process."""
    named: str | None = session._session.get_config_variable("ca_bundle")
    if named:
        if os.path.isfile(named):
            os.environ.setdefault(_VARIABLE, named)
        return named
    of_obstore = [os.environ[_VARIABLE]] if _VARIABLE in os.environ else _OF_THE_SYSTEM
    return next((file for file in of_obstore if os.path.isfile(file)), None)
