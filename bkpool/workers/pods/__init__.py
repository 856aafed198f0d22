"""Workers as pods of a cluster, reached over mutual TLS. What is in the cluster is watched, never remembered."""
