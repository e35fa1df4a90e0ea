"""The one training loop: a recipe goes in, a run folder comes out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.parallel import DistributedDataParallel

from peftzoo.errors import NonFiniteError
from peftzoo.train.calibration import calibrate_adapter
from peftzoo.train.checks import check_trained, non_finite, trained_table
from peftzoo.train.evaluation import Evaluation
from peftzoo.train.manifest import describe_run, recipe_digest
from peftzoo.train.memory import explain_out_of_memory, peak_memory
from peftzoo.train.models import add_adapter, checkpoint_activations, share_inputs
from peftzoo.train.optim import make_optimizer
from peftzoo.train.order import Order
from peftzoo.train.plots import draw_run
from peftzoo.train.processes import from_first, joined_processes
from peftzoo.train.progress import Report
from peftzoo.train.recipe import Recipe
from peftzoo.train.run_folder import RunFolder
from peftzoo.train.step import Stepper
from peftzoo.train.summary import comparison, metrics_line
from peftzoo.train.tasks import TASKS


@dataclass(frozen=True)
class Result:
    """What a run led to.

    Attributes:
        folder: the run folder.
        steps: optimizer steps taken.
        seconds: spent on these steps, evaluations left out.
        before: what the evaluation before the first step found; None without ``data.eval``.
        after: what the one after the last step found.
    """

    folder: Path
    steps: int
    seconds: float
    before: Evaluation | None
    after: Evaluation | None


def train(recipe: Recipe) -> Result:
    """Train the adapter that a recipe describes and leave all about it in the run folder.

    Every process of a launch calls this with the same recipe.

    Raises:
        RecipeError: the processes would not train together, or the device lacks the precision.
        DataError: the data cannot be read or trained on.
        ModelError: the model or adapter cannot be loaded, they do not fit, or a part would not train.
        MemoryLimitError: the device ran out of memory; says what to change.
        NonFiniteError: the loss or a gradient is not finite.
        CheckpointError: the run folder cannot be written.
        KeyboardInterrupt: when interrupted.

    Whatever ends the run after its first step, the adapter is saved as far as it came.
    """
    with joined_processes(recipe.train.mixed_precision, recipe_digest(recipe)) as accelerator:
        folder = from_first(lambda: RunFolder.claim(recipe.output.dir))
        run = None
        try:
            run = _Run(recipe, accelerator, folder)
            return run.fit()
        except BaseException as error:
            if accelerator.is_main_process:
                if run is None or run.stepper.taken == 0:
                    folder.release()
                else:
                    run.stop_early(error)
            raise


class _Run:
    """One run, from what is loaded for it to what it leaves behind."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, folder: RunFolder) -> None:
        self.recipe, self.accelerator, self.folder = recipe, accelerator, folder
        settings = recipe.train
        # the adapter must start the same everywhere, also with peft's methods, which draw from the global generators
        set_seed(settings.seed)
        self.task = TASKS[recipe.task](recipe)
        self.order = Order(
            rows=len(self.task.examples),
            seed=settings.seed,
            batch_size=settings.per_device_train_batch_size,
            accumulation=settings.gradient_accumulation_steps,
            processes=accelerator.num_processes,
            process=accelerator.process_index,
        )
        passes = settings.num_train_epochs * self.order.rows / self.order.rows_per_step
        self.steps = settings.max_steps or math.ceil(passes)
        self.report = Report(prints=accelerator.is_main_process, steps=self.steps)
        with explain_out_of_memory(recipe, accelerator.device, "loading"):
            base = self.task.load_model(accelerator.device)
            frozen = list(base.parameters())
            self.model = add_adapter(base, recipe, self.task.peft_task_type)
        with explain_out_of_memory(recipe, accelerator.device, "calibrating"):
            ranks = calibrate_adapter(self.model, self.task, self.order, accelerator, self.report)
        check_trained(self.model, frozen)
        share_inputs(self.model)
        if settings.activation_checkpointing:
            checkpoint_activations(self.model)
        self.facts: dict[str, Any] = describe_run(recipe, accelerator, self.model)
        if ranks is not None:
            self.facts["ranks"] = ranks
        optimizer, self.schedule = make_optimizer(self.model, recipe, self.steps)
        # the schedule is not prepared, because accelerate would move it once per process
        wrapped, prepared = accelerator.prepare(self.model, optimizer)
        if isinstance(wrapped, DistributedDataParallel):
            # an adapter's frozen tensors are buffers, and they would be sent to all processes at every forward
            wrapped.broadcast_buffers = False
        self.stepper = Stepper(accelerator, wrapped, prepared, settings.max_grad_norm)
        self.seconds, self.tokens = 0.0, 0
        # from here on randomness is dropout, which must differ between processes
        set_seed(settings.seed, device_specific=True)

    def fit(self) -> Result:
        """Judge, train, judge again, save; return what came of it."""
        from_first(self._begin)
        before = self._evaluate()
        with self.report:
            self._take_steps()
        after = self._evaluate()
        from_first(lambda: self._finish(before, after))
        return Result(self.folder.path, self.steps, self.seconds, before, after)

    def stop_early(self, error: BaseException) -> None:
        """Record why training ended, save the adapter as far as it came, and say where it is."""
        status = {KeyboardInterrupt: "interrupted", NonFiniteError: "not finite"}.get(type(error), "failed")
        self._write_manifest(status, error=str(error) or type(error).__name__)
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if non_finite(trained):
            saved = "the adapter is not finite any more and was not saved"
        else:
            saved = f"the adapter as it was then is in {self.folder.save(self.model, 'interrupted')}"
        self.report.say(f"stopped after {self.stepper.taken} steps; {saved}")

    def _begin(self) -> None:
        recipe, facts = self.recipe, self.facts
        self.folder.write_recipe(recipe)
        self._write_manifest("running")
        say = self.report.say
        if self.folder.path != Path(recipe.output.dir):
            say(f"{recipe.output.dir} is taken; this run goes to {self.folder.path}")
        if recipe.model.adapter_name_or_path is not None:
            say(f"going on from {recipe.model.adapter_name_or_path} with the method settings it was made with")
        say(f"{recipe.method.name} on {recipe.model.name_or_path}, {facts['device']}, processes: {facts['processes']}")
        say(trained_table(self.model))
        for note in self.task.notes:
            say(note)
        say(f"row 1 of {self.order.rows:,}: {self.task.describe(0)}")
        say(f"{self.steps} steps of {self.order.rows_per_step} rows, peak learning rate {recipe.learning_rate:.3g}")

    def _take_steps(self) -> None:
        """Take every step; log and evaluate in between as the recipe says."""
        settings = self.recipe.train
        loss, tokens = 0.0, 0  # sums since the last line of the log
        for number, rows in zip(range(1, self.steps + 1), self.order, strict=False):
            started = time.perf_counter()
            rate = float(self.schedule.get_last_lr()[0])
            with explain_out_of_memory(self.recipe, self.accelerator.device, "training"):
                batches = [self.task.collate([self.task.examples[row] for row in part]) for part in rows]
                done = self.stepper.take(batches, [self.task.count(batch) for batch in batches])
            if not done.skipped:
                self.schedule.step()
            self.seconds += time.perf_counter() - started
            self.tokens += done.tokens
            loss, tokens = loss + done.loss * done.tokens, tokens + done.tokens
            logged = number in (1, self.steps) or number % settings.logging_steps == 0
            pace = number / self.seconds
            self.report.step(number, loss=loss / tokens, learning_rate=rate, rate=pace, logged=logged)
            if logged:
                self._log(
                    "train",
                    step=number,
                    loss=loss / tokens,
                    learning_rate=rate,
                    # with fp16 a step may overflow; it is skipped, and the norm is no number that JSON knows
                    grad_norm=done.grad_norm if math.isfinite(done.grad_norm) else None,
                    tokens=self.tokens,
                    elapsed=self.seconds,
                )
                loss, tokens = 0.0, 0
            if self.recipe.eval.steps and number % self.recipe.eval.steps == 0 and number < self.steps:
                self._evaluate()

    def _evaluate(self) -> Evaluation | None:
        """Judge the model as it is now; None without held-out rows."""
        self.model.eval()
        with explain_out_of_memory(self.recipe, self.accelerator.device, "evaluating"):
            found = self.task.evaluate(self.model, self.accelerator)
        self.model.train()
        if found is not None:
            step = self.stepper.taken
            if not all(map(math.isfinite, found.metrics.values())):
                raise NonFiniteError(f"the evaluation after step {step}: {metrics_line(found.metrics)}")
            self._log("eval", step=step, **found.metrics)
            self.report.say(f"step {step}/{self.steps}  {metrics_line(found.metrics)}")
        return found

    def _finish(self, before: Evaluation | None, after: Evaluation | None) -> None:
        self.folder.save(self.model, "final")
        metrics = {"before": before.metrics, "after": after.metrics} if before and after else {}
        self._write_manifest("finished", **metrics)
        if self.recipe.output.plots:
            try:
                draw_run(self.folder.events("train"), self.folder.events("eval"), self.folder.path / "loss.png")
            except ImportError:
                self.report.say("loss.png was not drawn: `pip install 'peftzoo[plot]'` installs what it takes")
        if before and after:
            self.report.say(comparison(before, after, self.recipe.eval.show_samples))
        self.report.say(f"trained {self.steps} steps in {self.seconds:.1f} s; the run folder is {self.folder.path}")

    def _log(self, event: str, **values: Any) -> None:
        if self.accelerator.is_main_process:
            self.folder.log(event, **values)

    def _write_manifest(self, status: str, **more: Any) -> None:
        facts = {"status": status, **self.facts, "steps": self.stepper.taken, "train_seconds": self.seconds}
        facts["peak_memory_bytes"] = peak_memory(self.accelerator.device)
        self.folder.write_manifest(facts | more)
