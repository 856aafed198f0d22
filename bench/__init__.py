"""Measures what bkpool costs: the gateway compared with other proxies, and what the appliance adds to BuildKit.

`nox -s bench` runs everything and prints one table. It is no test: it judges nothing.
"""
