"""The Kubernetes API as plain documents: where to find the server, how to ask it, and what its errors mean.

The only room that imports the package `kubernetes`, of which it takes the reading of kubeconfig and of a pod's own
credentials. It knows nothing of pools, workers or pods.
"""

from bkpool.kube.client import ClusterAccess, Doc, KubeApi

__all__ = ["ClusterAccess", "Doc", "KubeApi"]
