"""Generated from control.proto by `nox -s stubs`. Do not edit the modules in here."""
