"""Workers as pods of a cluster, reached over mutual TLS; what stands there is watched, never remembered."""
