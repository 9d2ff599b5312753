"""``abft-mlx push``: a run to the hub, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abft_mlx.cli import progress
from abft_mlx.cli.options import Json, Quiet
from abft_mlx.cli.shell import Shell

if TYPE_CHECKING:
    from abft_mlx.exchange.push import Outcome, Upload


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    name: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The repository; made if there is none.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of writing.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH", help="The branch to write to; made if absent.", show_default="main"
        ),
    ] = None,
    with_peft: Annotated[
        bool, typer.Option("--with-peft", help="Send the adapter in PEFT's format, too.")
    ] = False,
    with_demonstrations: Annotated[
        bool,
        typer.Option(
            "--with-demonstrations",
            help="Send the demonstrations, too: they are texts of your data.",
        ),
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="The hub's name of a base that was a local folder.",
            show_default=False,
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The card's licence, e.g. mit.", show_default=False),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODE", help="A language of the texts, e.g. en; may be given many times."
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What abft-mlx eval RUN --json printed, for the card.",
            show_default="eval.json of the run",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent; needs no network or token.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Send a run to the hub: the adapter, its recipe and facts, and a model card.

    Neither texts nor paths of this machine are sent, unless you ask for --with-demonstrations.
    """
    from abft_mlx.exchange import card
    from abft_mlx.exchange import push as sending

    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        if not dry_run:
            sending.check(run)
            sending.token()
        options = card.Options(
            license, tuple(language or ()), sending.read_results(results) if results else None
        )
        with progress.board(shell) as board:
            board.stage("packing")
            upload = sending.pack(
                run,
                name,
                options=options,
                base_model=base_model,
                with_peft=with_peft,
                with_demonstrations=with_demonstrations,
            )
        document: dict[str, Any] = {
            "schema": 1,
            "repository": name,
            "dry_run": dry_run,
            "files": upload.sizes(),
            "card": upload.card,
        }
        if dry_run:
            _show(shell, upload)
        else:
            shell.say(f"sending {len(upload.files)} files to {name} …")
            with progress.board(shell) as board:
                board.stage(f"sending {progress.size(sum(upload.sizes().values()))}")
                outcome = sending.send(
                    upload, private=private, create_pr=create_pr, revision=revision
                )
            _tell(shell, name, outcome)
            document |= {
                "url": outcome.url,
                "commit": outcome.commit,
                "pull_request": outcome.pull_request,
                "created": outcome.created,
                "sent": list(outcome.sent),
                "removed": list(outcome.removed),
            }
    shell.document(document)


def _show(shell: Shell, upload: Upload) -> None:
    shell.tell(f"would be sent to {upload.name} (nothing was):")
    for path, size in upload.sizes().items():
        shell.tell(f"  {path}  {progress.size(size)}")
    shell.tell("", "README.md:", "", upload.card)


def _tell(shell: Shell, name: str, outcome: Outcome) -> None:
    if outcome.commit is None:
        where = f"pull request {outcome.pull_request}" if outcome.pull_request else name
        shell.tell(f"{where} has all of this already: no commit was made")
        return
    for path in outcome.sent:
        shell.say(f"  sent {path}")
    for path in outcome.removed:
        shell.say(f"  removed {path}, which is not part of this push")
    shell.tell(f"{'pull request' if outcome.pull_request else 'sent'}: {outcome.url}")
    shell.say(f"use it: abft-mlx eval --adapter {name}")
