"""What bkpool costs, measured: the gateway beside other proxies in one run, and what the appliance adds to BuildKit.

`nox -s bench` runs it all and prints one table. Never a test: it judges nothing.
"""
