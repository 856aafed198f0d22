"""What the controller should do next, as pure functions of the current state.

`decide.decide(snapshot, now)` is the entry. `actions` lists what it may ask for. `scaling` says which workers are too
many or missing, `lease_end` when a lease may leave its worker, `failures` when a failed worker is started again,
`health` when one that does not answer is replaced, `replacing` which ones get today's spec, `unneeded_caches` which
caches go, and `pool_status` what is written on the pool.
"""
