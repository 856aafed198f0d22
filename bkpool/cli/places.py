"""Where the user gave the value of an option: on the command line, or in the option's environment variable.

A message must name what the user typed, and only click knows it. This module checks no value and shows nothing.
"""

from __future__ import annotations

import click
from click.core import ParameterSource


def where(option: str) -> str:
    """What a message about an option's value begins with.

    Args:
        option: As on the command line: --token.

    Returns:
        The environment variable, if it gave the value to the command that runs here; else the option.
    """
    context = click.get_current_context(silent=True)
    for parameter in context.command.params if context else ():
        if option in parameter.opts and context and parameter.name and parameter.envvar:
            from_variable = context.get_parameter_source(parameter.name) is ParameterSource.ENVIRONMENT
            return str(parameter.envvar) if from_variable else option
    return option
