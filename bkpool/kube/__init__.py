"""A client of the Kubernetes API that works with plain documents: requests, watches, a reflector, leader election.

It is the only package that imports `kubernetes`, and only to read a kubeconfig and a pod's own credentials. It knows
nothing about pools, workers or pods.
"""

from bkpool.kube.access import ClusterAccess
from bkpool.kube.client import KubeApi
from bkpool.kube.documents import Doc
from bkpool.kube.limits import KubeLimits

__all__ = ["ClusterAccess", "Doc", "KubeApi", "KubeLimits"]
