"""A broker with listeners of every kind: TLS, a certificate of the client's, logins."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import kafka_broker
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from kafka_broker import Cluster

USER, PASSWORD = "ann", "o, 'sesame' 1"
LISTENERS = ("TLS", "MUTUAL", "LOGIN", "BOTH")
MODULES = "org.apache.kafka.common.security"


@dataclass(frozen=True)
class Secure:
    """The broker, its ports by listener, and the files of who uses it."""

    cluster: Cluster
    ports: dict[str, int]
    ca: Path
    certificate: Path
    key: Path

    def remove(self) -> None:
        """End it."""
        self.cluster.remove()


def start(folder: Path) -> Secure:
    """Start it with new certificates and the user of each mechanism."""
    pki = folder / "pki"
    pki.mkdir(parents=True)
    _authority(pki)
    _certificate(pki, "server", "subjectAltName=DNS:localhost")
    _certificate(pki, "client", "extendedKeyUsage=clientAuth")
    store = pki / "server-all.pem"
    store.write_text((pki / "server.key").read_text() + (pki / "server.pem").read_text())
    ports = dict(zip(LISTENERS, kafka_broker.free_ports(len(LISTENERS), None, 1), strict=True))
    cluster = kafka_broker.start(
        folder / "cluster", settings=_settings(store, pki / "ca.pem"), listeners=ports,
        parent=os.getpid(),
    )  # fmt: skip
    admin = AdminClient({"bootstrap.servers": cluster.bootstrap})
    for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):
        info = ScramCredentialInfo(mechanism, 4096)
        upsertion = UserScramCredentialUpsertion(USER, info, PASSWORD.encode())
        for future in admin.alter_user_scram_credentials([upsertion]).values():
            future.result()
    return Secure(cluster, ports, pki / "ca.pem", pki / "client.pem", pki / "client.key")


def _settings(store: Path, ca: Path) -> dict[str, str]:
    password = PASSWORD.replace("'", "\\'")
    mechanisms = "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER"
    settings = {
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,TLS:SSL,"
        "MUTUAL:SSL,LOGIN:SASL_PLAINTEXT,BOTH:SASL_SSL",
        "inter.broker.listener.name": "PLAINTEXT",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(store),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(ca),
        "listener.name.mutual.ssl.client.auth": "required",
        "sasl.enabled.mechanisms": mechanisms,
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "allow.everyone.if.no.acl.found": "true",
    }
    logins = {
        "plain": f'plain.PlainLoginModule required user_{USER}="{password}"',
        "scram-sha-256": "scram.ScramLoginModule required",
        "scram-sha-512": "scram.ScramLoginModule required",
        "oauthbearer": "oauthbearer.OAuthBearerLoginModule required "
        'unsecuredLoginStringClaim_sub="broker"',
    }
    for listener in ("login", "both"):
        for mechanism, module in logins.items():
            name = f"listener.name.{listener}.{mechanism}.sasl.jaas.config"
            settings[name] = f"{MODULES}.{module};"
    return settings


def _authority(pki: Path) -> None:
    _openssl(
        pki, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ca",
        "-keyout", "ca.key", "-out", "ca.pem",
    )  # fmt: skip


def _certificate(pki: Path, name: str, extension: str) -> None:
    _openssl(
        pki, "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
        "-keyout", f"{name}.key", "-out", f"{name}.csr",
    )  # fmt: skip
    (pki / "extension").write_text(extension)
    _openssl(
        pki, "x509", "-req", "-days", "2", "-in", f"{name}.csr", "-CA", "ca.pem",
        "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "extension", "-out", f"{name}.pem",
    )  # fmt: skip


def _openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)
