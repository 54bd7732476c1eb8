"""What holds for every job, and for every text that is none."""

from __future__ import annotations

import string

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from harp_batch.errors import JobError
from harp_batch.job import (
    ClusterSpec,
    GenerationSpec,
    GreedySpec,
    HarpSpec,
    JobSpec,
    ModelSpec,
    TaskSpec,
    parse_job,
)

names = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=12)
words = st.sampled_from(
    ["null", "~", "true", "yes", "1e-3", "0o7", "1_000", "=", "<<", "- a", "a: b", "#", ".inf"]
)
texts = words | st.text(min_size=1, max_size=30).filter(
    lambda text: text.isprintable() and text == text.strip()
)
counts = st.integers(1, 2**31 - 1)
fractions = st.floats(0, 1)

models = st.builds(
    ModelSpec,
    ref=texts,
    revision=st.none() | texts,
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    chat_template=st.booleans(),
)
tasks = st.builds(TaskSpec, task=texts, num_fewshot=st.none() | st.integers(0, 99), limit=st.none() | counts)
methods = st.builds(GreedySpec, name=names) | st.builds(
    HarpSpec,
    name=names,
    theta=st.floats(0, allow_infinity=False),
    delta=fractions,
    beta=fractions,
    mask=st.sampled_from(["step", "sequence"]),
)
clusters = st.builds(
    ClusterSpec,
    actors=st.just("auto") | counts,
    gpus_per_actor=st.just("auto") | st.floats(0, 1e6),
    slots=counts,
    shard_size=counts,
)


@st.composite
def jobs(draw: st.DrawFn) -> JobSpec:
    chosen = draw(st.lists(methods, min_size=1, max_size=3, unique_by=lambda method: method.name))
    return JobSpec(
        name=draw(names.filter(lambda name: name != "latest")),
        models=draw(st.lists(models, min_size=1, max_size=3, unique_by=lambda model: model.ref)),
        tasks=draw(st.lists(tasks, min_size=1, max_size=3, unique_by=lambda task: task.task)),
        methods=chosen,
        baseline=draw(st.sampled_from(chosen)).name,
        generation=GenerationSpec(max_new_tokens=draw(st.none() | counts)),
        cluster=draw(clusters),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@given(jobs())
@settings(max_examples=60)
def test_the_written_job_is_the_same_job_here_and_for_other_readers(job: JobSpec):
    text = job.to_yaml()
    assert parse_job(text) == job
    written = yaml.safe_load(text)
    assert [model["ref"] for model in written["models"]] == [model.ref for model in job.models]
    assert [task["task"] for task in written["tasks"]] == [task.task for task in job.tasks]


def outcome(text: str, overrides: list[str]) -> str:
    """What the user is told: nothing, or the refusal."""
    try:
        parse_job(text, "x.yaml", overrides)
    except JobError as error:
        return str(error)
    return ""


@given(st.text(max_size=80) | st.text("[]{}:,-?&*!|>'\"%@`# \n\tab01", max_size=60))
def test_any_text_is_a_job_or_one_printable_sentence(text: str):
    message = outcome(text, [])
    assert message.startswith("x.yaml:")
    assert message.isprintable()


@given(st.text("abx.=[]{}01 ", max_size=20) | st.text(max_size=20))
def test_any_override_is_taken_or_refused_in_one_sentence(override: str):
    message = outcome("{name: a, models: [m], tasks: [t], methods: [greedy]}", [override])
    assert message == "" or message.startswith(("--set ", "x.yaml:1: "))
