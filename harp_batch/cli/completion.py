"""``harp-batch completion``: TAB completes commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from harp_batch.cli.output import write


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    Examples:
      eval "$(harp-batch completion bash)"      in ~/.bashrc
      eval "$(harp-batch completion zsh)"       in ~/.zshrc
      harp-batch completion fish > ~/.config/fish/completions/harp-batch.fish
    """
    kind = get_completion_class(shell)
    root = click.get_current_context().find_root().command
    if kind is None:
        raise click.UsageError(f"click knows no completion for {shell}")
    write(kind(root, {}, "harp-batch", "_HARP_BATCH_COMPLETE").source())
