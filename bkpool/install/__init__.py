"""What a cluster needs before bkpool can run in it: custom resource definitions and manifests.

It renders and applies documents. It starts nothing and keeps no state.
"""
