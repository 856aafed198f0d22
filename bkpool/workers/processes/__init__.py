"""Workers as processes of this machine: each buildkitd in namespaces of its own, with a cache of its slot."""
