"""A look at a run before it starts: what the model is, what would be trained, what a row becomes; without weights."""

from __future__ import annotations

from peftzoo.train.checks import check_trained, parameter_counts, trained_table
from peftzoo.train.models import add_adapter
from peftzoo.train.progress import Report
from peftzoo.train.recipe import Recipe
from peftzoo.train.tasks import TASKS


def check(recipe: Recipe) -> None:
    """Print the model's structure, what the method trains of it, and one row with its trained tokens marked.

    Raises:
        DataError: the data cannot be read or trained on.
        ModelError: there is no such model, or the adapter does not fit it.
    """
    say = Report(prints=True, steps=0).say
    say("recipe: every setting is known and allowed")
    task = TASKS[recipe.task](recipe)
    base = task.empty_model()
    say(f"model: {type(base).__name__}, {parameter_counts(base)[1]:,} parameters")
    frozen = list(base.parameters())
    model = add_adapter(base, recipe, task.peft_task_type)
    check_trained(model, frozen)
    say(trained_table(model))
    for note in task.notes:
        say(note)
    say(f"row 1 of {len(task.examples):,}: {task.describe(0)}")
