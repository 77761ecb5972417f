"""Certificates and kubeconfigs of one run, signed by a CA of its own."""

import json
import subprocess
from pathlib import Path

from .places import API_URL, HOST_ADDRESS, NODES, PKI

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_CLIENTS = {
    "admin": "/O=system:masters/CN=admin",
    "controller-manager": "/CN=system:kube-controller-manager",
    "scheduler": "/CN=system:kube-scheduler",
    "proxy": "/CN=system:kube-proxy",
    "coredns": "/CN=system:coredns",
}
_API_NAMES = (
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
    "localhost",
)
_API_ADDRESSES = ("127.0.0.1", "10.96.0.1", HOST_ADDRESS)


def make() -> None:
    """The CA, the key of service accounts, one certificate for the API server and a kubeconfig for each client."""
    PKI.mkdir(parents=True, mode=0o700)
    _openssl(
        "req", "-x509", *_NEW_KEY, "-keyout", "ca.key", "-out", "ca.crt", "-days", "365", "-subj", "/CN=hone-cluster"
    )
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-out", "sa.key")
    _openssl("pkey", "-in", "sa.key", "-pubout", "-out", "sa.pub")
    addresses = [f"IP:{address}" for address in _API_ADDRESSES]
    _certificate("apiserver", "/CN=kube-apiserver", [f"DNS:{name}" for name in _API_NAMES] + addresses)
    for name, subject in _CLIENTS.items():
        _certificate(name, subject, [f"DNS:{name}"])
        _kubeconfig(name)
    for node in NODES:
        subject = f"/O=system:nodes/CN=system:node:{node.name}"
        _certificate(node.name, subject, [f"DNS:{node.name}", f"IP:{node.address}"])
        _kubeconfig(node.name)


def kubeconfig(name: str) -> Path:
    """Path of one client's kubeconfig."""
    return PKI / f"{name}.conf"


def _certificate(name: str, subject: str, alternatives: list[str]) -> None:
    (PKI / f"{name}.ext").write_text(f"subjectAltName={','.join(alternatives)}\n")
    _openssl("req", *_NEW_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
    signer = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "365")
    _openssl("x509", "-req", "-in", f"{name}.csr", *signer, "-out", f"{name}.crt", "-extfile", f"{name}.ext")


def _kubeconfig(name: str) -> None:
    files = {"client-certificate": str(PKI / f"{name}.crt"), "client-key": str(PKI / f"{name}.key")}
    data = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "hone", "cluster": {"server": API_URL, "certificate-authority": str(PKI / "ca.crt")}}],
        "users": [{"name": name, "user": files}],
        "contexts": [{"name": "hone", "context": {"cluster": "hone", "user": name}}],
        "current-context": "hone",
    }
    kubeconfig(name).write_text(json.dumps(data, indent=1))


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], cwd=PKI, check=True, capture_output=True)
