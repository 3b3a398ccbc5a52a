"""The train node's recipes: what is trained without a loss connected, and which datasets they take."""

from types import SimpleNamespace

import pytest

from diff2flow_nodes.nodes import NODE_CLASS_MAPPINGS
from diff2flow_nodes.training.objective import ObjectiveSettings
from diff2flow_nodes.training.recipes import EXPERT, RECIPES, TASK_NAMES, TASKS, goal_of


def _data(task):
    return SimpleNamespace(name="mine", has_noise=task == "few_steps", image_channels=4 * (task == "depth"))


@pytest.mark.parametrize("task", TASKS)
def test_a_task_takes_its_own_data_and_names_the_way_out_of_others(task):
    assert isinstance(goal_of(task, _data(task), None), ObjectiveSettings)
    for other in set(TASKS) - {task}:
        with pytest.raises(
            ValueError, match=f"recipe '{task}' trains on .* choose recipe '{other}', or connect {TASKS[task][1]}"
        ):
            goal_of(task, _data(other), None)
        assert goal_of(EXPERT, _data(other), None) == ObjectiveSettings()


def test_few_steps_is_the_recipe_fast_unless_a_loss_is_connected():
    [fast] = NODE_CLASS_MAPPINGS["Diff2FlowReflowRecipe"]().build("fast")
    assert goal_of("few_steps", _data("few_steps"), None) == fast
    assert goal_of("few_steps", _data("few_steps"), RECIPES["paper"]) is RECIPES["paper"]
    assert goal_of("few_steps", _data("finetune"), RECIPES["windows"]) is RECIPES["windows"]
    with pytest.raises(ValueError, match="recipe must be one of finetune, few_steps, depth, expert, not 'x'"):
        goal_of("x", _data("finetune"), None)


def test_the_node_begins_with_a_recipe_and_old_workflows_with_none():
    node = NODE_CLASS_MAPPINGS["Diff2FlowTrain"]
    choices, about = node.INPUT_TYPES()["optional"]["recipe"]
    assert tuple(choices) == TASK_NAMES and about["default"] == "finetune"
    import inspect

    assert inspect.signature(node.train).parameters["recipe"].default == EXPERT
