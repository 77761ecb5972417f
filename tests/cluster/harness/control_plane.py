"""etcd, API server, controller manager, scheduler, kube-proxy and CoreDNS, each startable and stoppable by name."""

import subprocess

from . import process
from .api import Kubectl, wait_until
from .pki import kubeconfig
from .places import HOST_ADDRESS, PKI, RUN, program

COMPONENTS = ("etcd", "apiserver", "controller-manager", "scheduler", "proxy", "coredns")
"""In the order of their start."""

_DNS_RIGHTS = [
    {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "coredns"},
        "rules": [
            {
                "apiGroups": [""],
                "resources": ["endpoints", "services", "pods", "namespaces"],
                "verbs": ["list", "watch"],
            },
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
        ],
    },
    {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "coredns"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "coredns"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:coredns"}],
    },
]


def admin() -> Kubectl:
    """kubectl as cluster-admin."""
    return Kubectl(program=program("kubectl"), kubeconfig=kubeconfig("admin"))


def start() -> None:
    """All of it; returns when the API server is ready and knows what CoreDNS may read."""
    _write_corefile()
    start_component("etcd")
    start_component("apiserver")
    wait_until_ready()
    for name in COMPONENTS[2:]:
        start_component(name)
    admin().apply(*_DNS_RIGHTS)


def start_component(name: str) -> None:
    """Start one that does not run."""
    if process.find(name) is None:
        process.start(name, _command(name))


def wait_until_ready(*, timeout_s: float = 60) -> None:
    """Until the API server says that it is ready; a component that ended is said at once, with the end of its log."""

    def look() -> bool:
        for name in ("etcd", "apiserver"):
            if process.find(name) is None:
                raise process.Ended(name)
        return is_ready()

    wait_until("the API server is ready", look, timeout_s=timeout_s)


def is_ready() -> bool:
    """Whether the API server answers now."""
    command = [
        program("kubectl"),
        f"--kubeconfig={kubeconfig('admin')}",
        "get",
        "--raw",
        "/readyz",
        "--request-timeout=2s",
    ]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _command(name: str) -> list[str]:
    commands: dict[str, list[str]] = {
        "etcd": [
            program("etcd"),
            f"--data-dir={RUN / 'etcd'}",
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--unsafe-no-fsync",  # right for tests, wrong for a benchmark of durability
        ],
        "apiserver": [program("kube-apiserver"), *_apiserver_flags()],
        "controller-manager": [program("kube-controller-manager"), *_controller_manager_flags()],
        "scheduler": [
            program("kube-scheduler"),
            f"--kubeconfig={kubeconfig('scheduler')}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        ],
        "proxy": [
            program("kube-proxy"),
            f"--kubeconfig={kubeconfig('proxy')}",
            "--proxy-mode=iptables",
            "--hostname-override=node-a",
            "--conntrack-max-per-core=0",
            "--oom-score-adj=0",
            "--healthz-bind-address=127.0.0.1:10256",
            "--nodeport-addresses=127.0.0.0/8",  # NodePorts for this machine alone
        ],
        "coredns": [program("coredns"), "-conf", str(RUN / "Corefile")],
    }
    return commands[name]


def _apiserver_flags() -> list[str]:
    return [
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={HOST_ADDRESS}",
        "--secure-port=6443",
        f"--tls-cert-file={PKI / 'apiserver.crt'}",
        f"--tls-private-key-file={PKI / 'apiserver.key'}",
        f"--client-ca-file={PKI / 'ca.crt'}",
        f"--service-account-key-file={PKI / 'sa.pub'}",
        f"--service-account-signing-key-file={PKI / 'sa.key'}",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--kubelet-preferred-address-types=InternalIP",
        f"--kubelet-client-certificate={PKI / 'admin.crt'}",
        f"--kubelet-client-key={PKI / 'admin.key'}",
        # Five minutes by default: too long for a test of what a dead node does to a Job.
        "--default-not-ready-toleration-seconds=5",
        "--default-unreachable-toleration-seconds=5",
    ]


def _controller_manager_flags() -> list[str]:
    return [
        f"--kubeconfig={kubeconfig('controller-manager')}",
        f"--service-account-private-key-file={PKI / 'sa.key'}",
        f"--root-ca-file={PKI / 'ca.crt'}",
        f"--cluster-signing-cert-file={PKI / 'ca.crt'}",
        f"--cluster-signing-key-file={PKI / 'ca.key'}",
        "--use-service-account-credentials=true",
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
        "--node-monitor-period=1s",
        "--node-monitor-grace-period=12s",  # a kubelet here renews its lease every 2 s
    ]


def _write_corefile() -> None:
    (RUN / "Corefile").write_text(
        f""".:53 {{
  bind {HOST_ADDRESS}
  errors
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {kubeconfig("coredns")} hone
    pods insecure
    ttl 5
  }}
}}
"""
    )
