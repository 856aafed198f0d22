"""The three roles of an appliance: API, controller and gateway. Each module opens one of them.

A process composes them: `host` has all three, `control_replica` has API, controller or both, `gateway_replica` has
the gateway. The composition decides the order; a role decides nothing about the others.
"""
