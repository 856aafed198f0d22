"""Local kind clusters: created, adopted, loaded with images and deleted, by the `kind` tool and the engine's API.

This is the only room that speaks to a container engine. It touches no cluster except the one it is given by name, and
never the user's own kubeconfig.
"""
