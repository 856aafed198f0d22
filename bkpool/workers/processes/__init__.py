"""Workers as processes of this machine: each buildkitd runs in its own namespaces, on the cache of its slot."""
