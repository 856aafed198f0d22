"""Local kind clusters: created, adopted, loaded with images and deleted, with the `kind` tool and the engine's API.

This is the only room that calls a container engine. It touches no cluster except the one that it is given by name,
and never the user's own kubeconfig.
"""
