"""``abft-mlx export`` and ``push``: an adapter for other programs, and a run on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from abft_mlx.cli import options, words
from abft_mlx.cli.progress import board, size
from abft_mlx.cli.shell import Shell, alone
from abft_mlx.errors import DataError, UsageError

if TYPE_CHECKING:
    from abft_mlx.exchange import Exported
    from abft_mlx.exchange.push import Outcome


def export(
    run: str,
    *,
    to: Literal["mlx", "peft", "fused"],
    output: Path,
    model: str | None = None,
    recipe: str | None = None,
    data: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: str | None = None,
    scale: float = 1.0,
    dequantize: bool = False,
    float_merged: bool = False,
    quantize: int | None = None,
    base_model: str | None = None,
    prompts: int = 64,
    measure: bool = True,
    settings: list[str] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Write an adapter for another program, and measure it.

    What was written is compared with base + adapter.
    A run folder needs nothing else: without its data, the result is measured on the run's own
    demonstrations. Another adapter needs --model, unless its configuration names the base, and
    --data or --recipe to be measured.

    Args:
        run (RUN): A run folder, an adapter folder of mlx-lm or PEFT, or owner/name of the hub.
        to: mlx: an adapter of stock mlx-lm. peft: an adapter of PEFT. fused: a model of mlx-lm with
            the adapter merged in.
        output (DIR): The folder to write.
        recipe (RECIPE): Whose texts to measure with; its base, too, where RUN names none. [default:
            the run's own]
        scale (FACTOR): Multiplies the adapter's effect: 0.5 is half of it, 2 twice.
        dequantize: fused: all of a quantized base in floating point.
        float_merged: fused: what the adapter changes in floating point, the rest quantized as it
            is.
        quantize (BITS): fused: quantize to 2, 3, 4, 5, 6 or 8 bits; of a quantized base what the
            adapter changes, else everything. [default: as the base]
        base_model (HUB_ID): mlx, peft: the base's name in the adapter's configuration. [default:
            the model, if it is a hub id]
        prompts: Test texts to measure the result on. [min: 1]
        measure: Compare the result with base + adapter.
    """
    alone("export")
    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        from abft_mlx import adapters, exchange, prediction, runtime

        runtime.use_wired_memory()
        folder = options.find_adapter(shell, run).folder
        own = folder / "recipe.yaml" if (folder / "recipe.yaml").is_file() else None
        named = recipe or (str(own) if own else None)
        revision = None
        if model is None and (recipe is not None or own is None):
            if own is not None:
                trained = options.open_recipe(str(own), {})
                model, revision = trained.model, trained.revision
            else:
                model = adapters.base_model(folder)
        if named is None and model is None:
            raise UsageError(f"{folder} does not name its base model; give --model")
        if named is None and data is None and measure:
            raise UsageError(
                f"{folder} has no recipe.yaml to take prompts from: give --data or --recipe to "
                "measure the result on, or --no-measure"
            )
        # What a recipe says of its own base's history is not true of another.
        base = {} if model is None else {"revision": revision}
        changes = options.overrides(
            settings, base, model=model, data=data, text_column=text_column,
            label_column=label_column, labels=labels,
        )  # fmt: skip
        opened = options.open_recipe(named, changes)
        try:
            with board(shell) as shown:
                exported = exchange.export(
                    folder,
                    to,
                    output,
                    model=opened.model,
                    revision=opened.revision,
                    recipe=opened if measure else None,
                    test_texts=data is not None or recipe is not None,
                    prompts=prompts,
                    scale=scale,
                    precision=exchange.Precision(dequantize, float_merged, quantize),
                    base_model=base_model,
                    overwrite=overwrite,
                    on_stage=shown.stage,
                    on_progress=shown.progress,
                )
        except DataError as error:
            raise DataError(f"{error}; or export with --no-measure", error.problems) from error
        _show(shell, exported)
        if (folder / prediction.DEMONSTRATIONS_FILE).is_file():
            shell.say(f"prompt    {words.command('predict', run, '--show-prompt', 'TEXT')}")
    shell.document(
        {
            "schema": 1,
            "run": run,
            "to": to,
            "model": opened.model,
            "scale": scale,
            "output": str(exported.folder),
            "files": exported.files,
            "bytes": sum(exported.files.values()),
            "layers": exported.layers,
            "base_model": exported.base_model,
            "weights": exported.precision,
            "measured": exported.measured,
            "measured_on": exported.measured_on,
            "warnings": list(exported.warnings),
        }
    )


def _show(shell: Shell, exported: Exported) -> None:
    """Print what was written, and how far it is from base + adapter."""
    megabytes = sum(exported.files.values()) / 1e6
    shell.tell(f"{len(exported.files)} files, {megabytes:,.2f} MB in {exported.folder}")
    if exported.precision is not None:
        shell.say(f"weights   {exported.precision}")
    if exported.base_model is not None:
        shell.say(f"base      {exported.base_model}")
    measured = exported.measured
    if measured is not None:
        n = measured["prompts"]
        shell.say(f"measured  on {n} prompts, against base + adapter: {exported.measured_on}")
        for name, key in (("written", "result"), ("base", "base")):
            logits = measured[key]
            shell.say(
                f"  {name:8}logits differ by {logits['vocabulary_mean']:.2g} on average and "
                f"{logits['vocabulary_max']:.2g} at most, those of labels by "
                f"{logits['labels_mean']:.2g} and {logits['labels_max']:.2g}; same label in "
                f"{logits['agreement']} of {n}"
            )
        share = f"{max(measured['kept'] or 0.0, 0.0):.1%} of the adapter's effect on labels is kept"
        none = "the adapter has no effect on labels"
        shell.say(f"  {none if measured['kept'] is None else share}")
    for text in exported.warnings:
        shell.tell(f"warning   {text}")


def push(
    run: Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    with_peft: bool = False,
    with_demonstrations: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    language: list[str] | None = None,
    results: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Send a run to the hub, with a model card.

    The adapter, its recipe and facts are sent. Neither texts nor paths of this machine are, unless
    you ask for --with-demonstrations.

    Args:
        run (RUN): A finished run folder.
        name (OWNER/NAME): The repository; made if there is none.
        private: Make a new repository private.
        revision (BRANCH): The branch to write to; made if absent. [default: main]
        with_peft: Send the adapter in PEFT's format, too.
        with_demonstrations: Send the demonstrations, too: they are texts of your data.
        base_model (OWNER/NAME): The hub's name of a base that was a local folder.
        license (ID): The card's licence, e.g. mit.
        language (CODE): A language of the texts, e.g. en; may be given many times.
        results (FILE): What abft-mlx eval RUN --json printed, for the card. [default: eval.json of
            the run]
        dry_run: Show what would be sent; needs no network or token.
    """
    from abft_mlx.exchange import card
    from abft_mlx.exchange import push as sending

    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        if not dry_run:
            sending.check(run)
            sending.token()
        shown_results = sending.read_results(results) if results else None
        with board(shell) as shown:
            shown.stage("packing")
            upload = sending.pack(
                run,
                name,
                options=card.Options(license, tuple(language or ()), shown_results),
                base_model=base_model,
                with_peft=with_peft,
                with_demonstrations=with_demonstrations,
            )
        sizes = upload.sizes()
        document: dict[str, Any] = {
            "schema": 1,
            "repository": name,
            "dry_run": dry_run,
            "files": sizes,
            "card": upload.card,
        }
        if dry_run:
            shell.tell(f"would be sent to {upload.name} (nothing was):")
            shell.tell(*(f"  {path}  {size(count)}" for path, count in sizes.items()))
            shell.tell("", "README.md:", "", upload.card)
        else:
            shell.say(f"sending {len(upload.files)} files to {name} …")
            with board(shell) as shown:
                shown.stage(f"sending {size(sum(sizes.values()))}")
                outcome = sending.send(upload, private=private, revision=revision)
            _show_outcome(shell, name, outcome)
            document |= {
                "url": outcome.url,
                "commit": outcome.commit,
                "created": outcome.created,
                "sent": list(outcome.sent),
                "removed": list(outcome.removed),
            }
    shell.document(document)


def _show_outcome(shell: Shell, name: str, outcome: Outcome) -> None:
    """Print what was sent."""
    if outcome.commit is None:
        shell.tell(f"{name} has all of this already: no commit was made")
        return
    shell.say(*(f"  sent {path}" for path in outcome.sent))
    shell.say(*(f"  removed {path}, which is not part of this push" for path in outcome.removed))
    shell.tell(f"sent: {outcome.url}")
    shell.say(f"use it: abft-mlx eval --adapter {name}")
