"""``eyechart models``: what can be opened without a hub."""

import json

import typer

from eyechart.cli.options import Json
from eyechart.cli.running import messages, stdout


def models(json_out: Json = False) -> None:
    """List the models that can be opened without a hub, and those already in the caches."""
    with messages():
        from eyechart.models import listing
        from eyechart.models.hub import cached_on_hub

        rows, hub = listing(), cached_on_hub()
        if json_out:
            typer.echo(json.dumps({"catalogue": rows, "hub_cache": hub}, indent=1))
            return
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column in ("model", "cached", "what it is"):
            table.add_column(column)
        for row in rows:
            table.add_row(row["name"], "yes" if row["cached"] else "-", row["about"])
        for name in hub:
            table.add_row(name, "yes", "in the Hugging Face cache; opens if it is causal")
        stdout().print(table)
        stdout().print(
            "\nAlso any folder in Hugging Face format, .gguf file, or name on the hub.", style="dim"
        )
