"""Local kind clusters: created, adopted, loaded with images, deleted; through the `kind` tool and the engine's API.

The only room that speaks to a container engine. It touches no cluster but the one it is asked for by name, and never
the user's own kubeconfig.
"""
