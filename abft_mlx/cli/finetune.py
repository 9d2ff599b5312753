"""``abft-mlx finetune``: from a recipe, or from a model and a file, to an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from abft_mlx.cli import options, words
from abft_mlx.cli.progress import Board, BoardEvents, board, duration, size
from abft_mlx.cli.shell import Shell, join_ranks
from abft_mlx.errors import UsageError

if TYPE_CHECKING:
    from abft_mlx.experiment import Experiment, RunResult

# What the paper did (arXiv 2505.14233, section 4 and appendix A).
_PAPER: dict[str, Any] = {
    "prompt.selection": "random",
    "prompt.demonstrations": 4,
    "adapter.kind": "paper",
    "adapter.layers": None,
    "objective.kind": "abft",
    "training.learning_rate": None,
    "training.shared_demonstrations": 1,
    "training.examples": 512,
    "training.updates": 32,
    "training.prompts_per_update": 32,
    "training.validate_every": 0,
    "evaluation.demonstrations": "per_query",
    "evaluation.repeats": 2,
    "prediction.draws": 1,
    "prediction.calibration_texts": 0,
}


def finetune(
    recipe: str | None = None,
    *,
    model: str | None = None,
    data: str | None = None,
    output: Path | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: str | None = None,
    label_words: str | None = None,
    updates: int | None = None,
    learning_rate: float | None = None,
    demonstrations: str | None = None,
    seed: int | None = None,
    paper: bool = False,
    final: bool = False,
    settings: list[str] | None = None,
    resume: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Train an adapter on labelled texts, and measure it.

    Either name a recipe, or give --model and --data and let the defaults do the rest.

    Args:
        output (DIR): The run folder. [default: runs/NAME-DATE-TIME]
        seed: training.seed: prompts, their order and lora_a. [min: 0] [default: 42]
        paper: As in the paper: ABFT on 4 random demonstrations, W_Q and W_K in full at 2e-5, or
            LoRA of rank 16 at 1e-4 above 10 billion parameters; measured in its way, too.
        final: Train on the test rows, too, once you have measured; there is no verdict then.
        resume (RUN): Continue the run in this folder; give nothing else then.
    """
    base = {**(_PAPER if paper else {}), **({"data.holdout": "none"} if final else {})}
    changes = options.overrides(
        settings, base, model=model, data=data, text_column=text_column, label_column=label_column,
        labels=labels, label_words=label_words, updates=updates, learning_rate=learning_rate,
        demonstrations=demonstrations, training_seed=seed,
    )  # fmt: skip
    if resume is not None and (recipe or changes or output or overwrite):
        raise UsageError(
            "--resume takes everything from the run's own recipe.yaml: give no recipe, no --set "
            "and no other flag that changes it"
        )
    if resume is None and recipe is None:
        options.both_needed(model, data, " (abft-mlx recipes list shows the recipes)")
    ranks = join_ranks(resumable=True)
    # The first rank speaks for all.
    shell = Shell(as_json=as_json and ranks.first, quiet=quiet or not ranks.first)
    with shell.speaking():
        from abft_mlx import api, experiment, runtime

        runtime.use_wired_memory()
        opened, folder = None, resume
        if folder is None:
            opened = options.open_recipe(recipe, changes)
            folder = output or api.default_output(opened)
        with (
            board(shell) as shown,
            Follow(shell, shown, folder, first=ranks.first, begun=resume is not None) as follow,
        ):
            result = experiment.finetune(
                opened,
                folder,
                overwrite=overwrite,
                events=follow,
                stop=follow.stop,
                ranks=ranks,
            )
        if not ranks.first:
            return
        shell.tell(*_outcome(result))
    shell.document(_document(result))


class Follow(BoardEvents):
    """Prints the plan of a run when it is ready, and shows its updates.

    While it is open a signal ends the run after the update that goes on.

    Args:
        shell: of the command.
        shown: where updates are shown.
        output: the run folder.
        first: whether this process speaks for all.
        begun: whether the folder holds a run that can be resumed.
    """

    def __init__(
        self,
        shell: Shell,
        shown: Board,
        output: Path,
        *,
        first: bool = True,
        begun: bool = False,
    ) -> None:
        from abft_mlx import trainer

        super().__init__(shown)
        self.stop = trainer.Stop(shown.note)
        self._watching = self.stop.watching()
        self._shell, self._output = shell, output
        self._first, self._begun = first, begun

    def __enter__(self) -> Follow:
        self._watching.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._board.clear()
            if self._begun and self._first:
                resume = words.command("finetune", "--resume", self._output)
                self._shell.tell(f"to go on: {resume}")
        self._watching.__exit__(kind, *rest)

    def prepared(self, experiment: Experiment, trainable: int) -> None:
        """Print the plan and have updates shown."""
        self._board.clear()
        if self._shell.quiet and self._first:
            self._shell.tell(*(f"warning   {text}" for text in _warnings(experiment)))
        self._shell.say(*_plan(experiment, trainable, self._output))
        self._begun = True
        self._board.training(experiment.recipe.training.updates)


def _plan(experiment: Experiment, trainable: int, output: Path) -> list[str]:
    """What a run will work on, as lines for a person."""
    recipe, task = experiment.recipe, experiment.task
    adapter, training, prompt = recipe.adapter, recipe.training, recipe.prompt
    rows = task.splits.rows
    parts = [
        f"{len(some):,} for {name}"
        for name, some in rows.items()
        if some and not (name == "demonstrations" and some == rows["training"])
    ]
    labels = []
    for (name, n), word in zip(task.texts.class_counts().items(), task.space.words, strict=True):
        renamed = "" if word.strip() == name else f", in prompts {word.strip()!r}"
        labels.append(f"{name} ({n:,}{renamed})")
    more = len(labels) - words.CLASSES_SHOWN
    listed = ", ".join(labels[: words.CLASSES_SHOWN]) + (f" and {more} more" if more > 0 else "")
    lines = [
        f"model     {recipe.model}" + (f" at {recipe.revision}" if recipe.revision else ""),
        f"data      {task.texts.source}: {len(task.texts):,} texts: {', '.join(parts)}",
        f"labels    {listed}",
        *(f"warning   {text}" for text in _warnings(experiment)),
    ]
    if training.updates:
        what = f"LoRA of rank {adapter.rank} on" if adapter.kind == "lora" else "the whole of"
        what += " W_Q and W_K" + (", and the LM head" if adapter.head else "")
        what += f": {training.updates} updates of {training.prompts_per_update} prompts with "
        what += f"{prompt.demonstrations} demonstrations{' in chat turns' if prompt.chat else ''}"
        if training.together > 1:
            what += f", shared by {training.together} prompts"
        kinds = {"end_to_end": ", end to end", "read_out": ", label-attention read-out"}
        what += kinds.get(recipe.objective.kind, "")
        if experiment.mixture:
            what += f", on {', '.join(task.name for task in experiment.mixture)}"
        lines += [f"training  {trainable:,} parameters, {what}", f"layers    {_layers(experiment)}"]
    else:
        lines.append("training  none: only head weights are fitted, to the model as it is")
    if task.builder.shortened:
        lines.append(
            f"warning   {task.builder.shortened:,} texts shortened to "
            f"{prompt.max_text_tokens} tokens (prompt.max_text_tokens)"
        )
    return [*lines, f"output    {output}"]


def _layers(experiment: Experiment) -> str:
    """Which layers train, and why."""
    chosen, window = experiment.recipe.adapter.layers, experiment.window
    if window is not None and not window.heads:
        return f"all train: no induction head was seen in {window.prompts} training prompts"
    if window is not None:
        total = sum(heads is not None for heads in window.heads_by_layer)
        listed = ", ".join(map(str, sorted(window.layers)))
        return (
            f"{listed} of {total} train: they hold "
            f"{window.heads_inside / window.heads:.0%} of the {window.heads:.1f} induction heads "
            f"in a prompt, seen in {window.prompts} training prompts"
        )
    if isinstance(chosen, list):
        return f"{', '.join(map(str, sorted(chosen)))} train, as adapter.layers says"
    return "all train, as adapter.layers says (auto chooses those with induction heads)"


def _warnings(experiment: Experiment) -> list[str]:
    """What is odd about the data, one line each."""
    return [*experiment.task.texts.warnings, *experiment.task.splits.warnings]


def _outcome(result: RunResult) -> list[str]:
    """The result as lines for a person."""
    progress, recipe = result.progress, result.experiment.recipe
    lines = []
    if progress.updates:
        lines.append(
            f"done: {progress.updates} updates in {duration(progress.seconds)}, "
            f"peak memory {size(progress.peak_memory_bytes)}, "
            f"adapter {size(result.adapter_bytes)}"
        )
    validation = _validation(result)
    if validation and not progress.updates:
        lines.append(f"validation accuracy: {validation['after']:.1%}")
    elif validation:
        lines.append(
            f"validation accuracy: {validation['before']:.1%} before, "
            f"{validation['after']:.1%} after, {validation['best']:.1%} at best "
            f"(update {validation['best_update']})"
        )
        if validation["best_update"] == 0 and recipe.training.keep_best:
            read = recipe.objective.kind == "read_out"
            what = "the fitted head weights are kept" if read else "the adapter changes nothing"
            lines.append(f"no update did better on validation texts than none, so {what}")
    chosen = result.classifier or {}
    if chosen.get("kept") == "prompting":
        lines.append(
            f"prompting answers {chosen['validation_prompting']:.1%} of the validation texts "
            f"rightly, the trained model {chosen['validation_accuracy']:.1%}: so this run answers "
            "by prompting, and its adapter changes nothing"
        )
    lines.append(f"adapter in {result.output}")
    if result.evaluation is not None:
        return [*lines, "", *words.verdict(result.evaluation)]
    if recipe.data.holdout == "none":
        return [*lines, f"next: {words.command('predict', result.output, 'FILE')}"]
    return [*lines, f"next: {words.command('eval', result.output)}"]


def _validation(result: RunResult) -> dict[str, Any] | None:
    """Accuracy on the validation rows, if there are any."""
    progress = result.progress
    if not progress.validations:
        return None
    return {
        "before": progress.validations[0][1],
        "after": progress.validations[-1][1],
        "best": progress.best_accuracy,
        "best_update": progress.best_update,
    }


def _document(result: RunResult) -> dict[str, Any]:
    """The JSON document."""
    experiment, progress = result.experiment, result.progress
    document: dict[str, Any] = {
        "schema": 1,
        "output": str(result.output),
        "model": experiment.recipe.model,
        "data": experiment.recipe.data.source,
        "labels": list(experiment.task.space.names),
        "label_words": list(experiment.task.space.words),
        "warnings": _warnings(experiment),
        "trainable_parameters": result.trainable_parameters,
        "adapter_bytes": result.adapter_bytes,
        "updates": progress.updates,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "peak_memory_bytes": progress.peak_memory_bytes,
    }
    if experiment.window is not None:
        document["layers"] = experiment.window.layers
    if validation := _validation(result):
        document["validation"] = validation
    if result.classifier is not None:
        document["classifier"] = result.classifier
    return document | (result.evaluation or {})
