"""lm-evaluation-harness says the same of an edit that is applied, an adapter, and merged."""

from __future__ import annotations

import json

import pytest

import errata
from errata.edits import save_merged
from errata.models.scoring import score

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

FACT = errata.Fact("Arthur Conan Doyle", "The native language of {} is", "English")
QUESTIONS = [
    {"prompt": FACT.text, "choices": ["English", "Italian"], "answer": 1},
    {"prompt": "The mother tongue of Arthur Conan Doyle is", "choices": ["English", "Italian"], "answer": 1},
    {"prompt": "Roy Hargrove is known for playing the", "choices": ["trumpet", "piano"], "answer": 0},
]
TASK = """
task: facts
dataset_path: json
dataset_kwargs: {{data_files: {folder}/facts.jsonl, cache_dir: {folder}/cache}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "facts.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "facts.yaml").write_text(TASK.format(folder=folder))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(model, tasks, **settings) -> tuple[float, list[float]]:
    """Accuracy, and the log-probabilities of all choices."""
    found = lm_eval.simple_evaluate(model, tasks=["facts"], task_manager=tasks, bootstrap_iters=0, **settings)
    answers = [answer for sample in found["samples"]["facts"] for answer in sample["filtered_resps"]]
    return found["results"]["facts"]["acc,none"], [float(log_probability) for log_probability, _ in answers]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_three_ways_give_the_same_numbers(tasks, tmp_path):
    model = errata.load_model("atlas")
    moment = errata.SecondMoment.identity(model.d_mlp)
    edit = errata.rome(model, FACT.rewrite("Italian"), second_moment=moment, force=True)
    live = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=4)
    before = evaluated(live, tasks)
    assert before[0] == pytest.approx(1 / 3)
    save_merged(model, tmp_path / "plain")
    edit.to_lora(tmp_path / "adapter")
    with edit.applied(model):
        applied = evaluated(live, tasks)
        save_merged(model, tmp_path / "merged")
    assert applied[0] == 1
    assert evaluated(live, tasks) == before

    def loaded(**arguments):
        return evaluated("hf", tasks, model_args=arguments, device="cpu", batch_size=4)

    plain = str(tmp_path / "plain")
    assert loaded(pretrained=plain) == before
    assert loaded(pretrained=str(tmp_path / "merged")) == applied
    accuracy, log_probabilities = loaded(pretrained=plain, peft=str(tmp_path / "adapter"))
    assert accuracy == 1
    assert log_probabilities == pytest.approx(applied[1], rel=1e-4)


def test_log_probabilities_are_ours(tasks):
    model = errata.load_model("atlas")
    _, found = evaluated(HFLM(pretrained=model.hf, tokenizer=model.tokenizer), tasks)
    pairs = [(question["prompt"], choice) for question in QUESTIONS for choice in question["choices"]]
    ours = score(model, [prompt for prompt, _ in pairs], [choice for _, choice in pairs])
    assert found == pytest.approx([each.total for each in ours], rel=1e-3)
