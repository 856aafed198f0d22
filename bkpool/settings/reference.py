"""docs/configuration.md, written from the model. A test compares it with the file."""

from __future__ import annotations

import inspect

from bkpool.settings.catalogue import Setting, all_settings, section_models

_HEAD = """# Configuration

This page is written by `bkpool config --markdown > docs/configuration.md`. Do not edit it.

A setting has its value from the first of these sources that gives one:

1. an option of `bkpool up`, where the table names one;
2. the environment variable of the table; in a cluster this is the way to set anything;
3. `config.toml` in `BKPOOL_HOME`;
4. the options that an earlier `bkpool up` of this home was given: `up` remembers them, and says so when it uses them;
5. the default.

`bkpool config` shows every value with its source. With options of `up` it shows what `up` would use with them.
`bkpool config set NAME VALUE` writes a line of `config.toml`, `bkpool config unset NAME` removes it and forgets the
remembered value, and `bkpool config unset --all` forgets everything that is remembered. A change takes effect at the
next `up`. `up` does not remember `-f`, `--image-archive`, `--roles` and `--pool`. It remembers no secret: no option
of `up` takes one. The backend (`--backend`) is not among the remembered options, because the home has its own file
for it (`backend`). The home (`BKPOOL_HOME`) and the backend cannot be set in `config.toml`.

```toml
[api]
address = "0.0.0.0:8082"
tls = true

[gateway]
hosts = ["builds.example"]
handshake_timeout = "15s"
```

A duration is written as in Go: `500ms`, `15s`, `1h30m`. In a variable, and for `bkpool config set`, the items
of a list have commas between them and no brackets around them. `config set` refuses a value that contradicts another
one of the file. A setting that does not exist, or a value that is not allowed, is an error.
"""


def markdown() -> str:
    """The page."""
    parts = [_HEAD]
    for section, model in section_models().items():
        parts.append(f"\n## [{section}]\n\n{' '.join(inspect.getdoc(model).split())}\n")  # type: ignore[union-attr]
        parts.append("\n| setting | default | allowed | |\n|---|---|---|---|\n")
        parts += [_row(one) for one in all_settings().values() if one.section == section]
    return "".join(parts)


def _row(one: Setting) -> str:
    names = f"`{one.field}`<br>`{one.variable}`" + (f"<br>`{one.option}`" if one.option else "")
    default = one.default_text
    return f"| {names} | {default or '—'} | {one.allowed} | {one.description} |\n"
