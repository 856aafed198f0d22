"""What a cluster needs before bkpool can run in it: custom resource definitions and manifests.

This room renders and applies documents. It starts nothing and stores no state.
"""
