"""The job file: what it means, and what is said of every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harp_batch.errors import JobError, TaskError
from harp_batch.job import GreedySpec, HarpSpec, ModelSpec, TaskSpec, load_job, parse_job

JOBS = sorted((Path(__file__).resolve().parents[2] / "jobs").glob("*.yaml"))

JOB = """\
name: gsm8k                    # [A-Za-z0-9._-]+
models:                        # the run is models x tasks x methods
  - ref: HuggingFaceTB/SmolLM2-135M-Instruct   # hub id | local directory | .gguf file | wheel:...
    revision: main             # hub only
    dtype: float32             # float32 | bfloat16 | float16
    chat_template: true
tasks:
  - gsm8k                      # any lm-eval task name
  - {task: commonsense_qa, num_fewshot: 0, limit: 200}
methods:
  - greedy
  - harp: {theta: 1.0, delta: 0.2, beta: 0.5, mask: step}
baseline: greedy               # the method the others are compared with
generation: {max_new_tokens: 256}
cluster: {actors: auto, gpus_per_actor: auto, slots: 64, shard_size: 32}
seed: 0
"""

SHORTEST = "{name: a, models: [m], tasks: [t], methods: [greedy]}"


def refusal(text: str, **options: Any) -> str:
    with pytest.raises(JobError) as caught:
        parse_job(text, "jobs/x.yaml", **options)
    return str(caught.value)


def with_change(old: str, new: str) -> str:
    assert JOB.count(old) == 1
    return JOB.replace(old, new)


def test_every_key_of_a_full_job_arrives():
    job = parse_job(JOB)
    assert (job.name, job.baseline, job.seed) == ("gsm8k", "greedy", 0)
    assert job.models == (ModelSpec(ref="HuggingFaceTB/SmolLM2-135M-Instruct", revision="main"),)
    assert job.tasks == (TaskSpec(task="gsm8k"), TaskSpec(task="commonsense_qa", num_fewshot=0, limit=200))
    assert job.methods == (GreedySpec(), HarpSpec(theta=1.0, delta=0.2, beta=0.5, mask="step"))
    assert job.generation.max_new_tokens == 256
    assert (job.cluster.actors, job.cluster.gpus_per_actor) == ("auto", "auto")
    assert (job.cluster.slots, job.cluster.shard_size) == (64, 32)


def test_defaults_of_the_shortest_job():
    job = parse_job(SHORTEST)
    assert job.models[0].dtype == "float32"
    assert job.models[0].chat_template is True
    assert job.models[0].revision is None
    assert (job.tasks[0].num_fewshot, job.tasks[0].limit) == (None, None)
    assert job.baseline == "greedy"
    assert job.generation.max_new_tokens is None  # the task's own
    assert job == parse_job(
        SHORTEST[:-1]
        + ", seed: 0,"
        + " cluster: {actors: auto, gpus_per_actor: auto, slots: 64, shard_size: 32}}"
    )


def test_harps_defaults_are_the_papers():
    job = parse_job("{name: a, models: [m], tasks: [t], methods: [harp]}")
    settings = {"kind": "harp", "theta": 1.0, "delta": 0.2, "beta": 0.5, "mask": "step"}
    assert job.methods[0].settings == settings
    assert job.baseline == "harp"


def test_two_settings_of_one_method_stand_side_by_side():
    job = parse_job(with_change("- greedy", "- harp: {name: soft, delta: 0.1, mask: sequence}\n  - greedy"))
    assert [(m.name, m.kind) for m in job.methods] == [
        ("soft", "harp"),
        ("greedy", "greedy"),
        ("harp", "harp"),
    ]
    assert "name" not in job.methods[0].settings


def test_a_method_may_have_empty_settings():
    assert parse_job(with_change("- greedy", "- greedy:")) == parse_job(JOB)


def test_a_job_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse_job(JOB).seed = 1


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_that_is_shipped_loads(path: Path):
    job = load_job(path)
    assert {method.kind for method in job.methods} == {"greedy", "harp"}
    assert job.baseline == "greedy"


def test_there_are_jobs():
    assert {path.stem for path in JOBS} >= {"demo", "gsm8k", "commonsense_qa", "lambada"}


UNKNOWN = {
    ("theta: 1.0", "thete: 1.0"): "12: methods[1].harp.thete: unknown key; did you mean 'theta'?",
    ("name: gsm8k ", "nmae: gsm8k "): "1: nmae: unknown key; did you mean 'name'?",
    ("    revision:", "    revison:"): "4: models[0].revison: unknown key; did you mean 'revision'?",
    ("limit: 200", "limits: 200"): "9: tasks[1].limits: unknown key; did you mean 'limit'?",
    ("slots: 64", "<<: 64"): (
        "15: cluster.<<: unknown key; known here: actors, cpu_actors, gpus_per_actor, hang_timeout, shard_size, slots"
    ),
    ("- greedy", "- greedy: {p: 1}"): "11: methods[0].greedy.p: unknown key; known here: name",
    ("theta: 1.0", "kind: beam"): (
        "12: methods[1].harp.kind: unknown key; known here: beta, delta, mask, name, theta"
    ),
}
STRUCTURE = {
    ("slots: 64", "slots: 64, slots: 3"): "15: cluster.slots: duplicate key; line 15 has it already",
    ("seed: 0", "name: b"): "16: name: duplicate key; line 1 has it already",
    ("revision: main", "revision: &a main"): (
        "4: models[0].revision: anchors and aliases (& and *) are not allowed; write the value out"
    ),
    ("revision: main", "revision: *a"): (
        "4: models[0].revision: anchors and aliases (& and *) are not allowed; write the value out"
    ),
    (
        "revision: main",
        "revision: !!str main",
    ): "4: models[0].revision: tags (!) are not allowed; write the plain value",
    ("seed: 0", "!!python/object/apply:os.system [ls]: 0"): (
        "16: tags (!) are not allowed; write the plain value"
    ),
    ("slots: 64", "slots: {a: *b}"): (
        "15: cluster.slots.a: anchors and aliases (& and *) are not allowed; write the value out"
    ),
    ("- greedy", "- !x greedy"): "11: methods[0]: tags (!) are not allowed; write the plain value",
    ("theta: 1.0", "&a theta: 1.0"): (
        "12: methods[1].harp: anchors and aliases (& and *) are not allowed; write the value out"
    ),
    ("seed: 0", "seed: " + "[" * 20 + "]" * 20): f"16: seed{'[0]' * 19}: nested deeper than 20 levels",
    ("name: gsm8k ", "name: latest "): ("1: name: 'latest' means the newest run; give the job another name"),
    ("seed: 0", "8: 0"): "16: a key must be text",
    ("seed: 0", "? [a]\n: 0"): "16: a key must be text",
    ("seed: 0", "\tseed: 0"): "16: not valid YAML: a tab where only spaces may indent",
    ("seed: 0", "seed: [0"): "17: not valid YAML: expected ',' or ']', but got '<stream end>'",
    ("seed: 0", "seed: a: b"): "16: not valid YAML: mapping values are not allowed here",
    (
        "seed: 0",
        "---\nseed: 0",
    ): "16: not valid YAML: a second document (---) starts here; one file holds one job",
    ("seed: 0", "seed: \x01"): "16: character U+0001 is not allowed",
    ("seed: 0", 'seed: "\\Uffffffff"'): "1: not valid YAML: an escape names no character",
}
TYPES = {
    ("seed: 0", 'seed: "8"'): "16: seed: must be a whole number, not '8'",
    ("seed: 0", "seed: 1e3"): "16: seed: must be a whole number, not 1000.0",
    ("seed: 0", "seed: true"): "16: seed: must be a whole number, not true",
    ("seed: 0", "seed:"): "16: seed: must be a whole number, not null",
    ("theta: 1.0", "theta: '8'"): "12: methods[1].harp.theta: must be a number, not '8'",
    (
        "chat_template: true",
        "chat_template: yes",
    ): "6: models[0].chat_template: must be true or false, not 'yes'",
    (
        "chat_template: true",
        "chat_template: on",
    ): "6: models[0].chat_template: must be true or false, not 'on'",
    ("chat_template: true", "chat_template: 1"): "6: models[0].chat_template: must be true or false, not 1",
    ("name: gsm8k ", "name: 8 "): "1: name: must be text, not 8",
    ("- gsm8k ", "- 3 "): "8: tasks[0]: must be a mapping (key: value), not 3",
    ("- greedy", "- greedy: 3"): "11: methods[0].greedy: must be a mapping (key: value), not 3",
    ("- greedy", "- 3"): "11: methods[0]: must be a method's name or one mapping {method: settings}, not 3",
    ("- greedy", "- {name: a, greedy: {}}"): (
        "11: methods[0]: must be a method's name or one mapping {method: settings}, not a mapping"
    ),
    ("{max_new_tokens: 256}", "256"): "14: generation: must be a mapping (key: value), not 256",
    ("actors: auto", "actors: four"): "15: cluster.actors: must be auto or a number, not 'four'",
    ("actors: auto", "actors: 1.5"): "15: cluster.actors: must be a whole number, not 1.5",
    ("actors: auto", "actors: [1]"): "15: cluster.actors: must be auto or a number, not a list",
    ("dtype: float32 ", "dtype: float64 "): (
        "5: models[0].dtype: must be 'float32', 'bfloat16' or 'float16', not 'float64'"
    ),
    ("mask: step", "mask: token"): "12: methods[1].harp.mask: must be 'step' or 'sequence', not 'token'",
}
RANGES = {
    (
        "name: gsm8k ",
        "name: gs m8k ",
    ): "1: name: must be made of letters, digits, '.', '_' and '-', not 'gs m8k'",
    ("theta: 1.0", "theta: -1"): "12: methods[1].harp.theta: must be at least 0.0, not -1",
    ("theta: 1.0", "theta: .inf"): "12: methods[1].harp.theta: must be a finite number, not inf",
    ("beta: 0.5", "beta: 1.5"): "12: methods[1].harp.beta: must be at most 1.0, not 1.5",
    ("beta: 0.5", "beta: .nan"): "12: methods[1].harp.beta: must be a finite number, not nan",
    ("delta: 0.2", "delta: -0.1"): "12: methods[1].harp.delta: must be at least 0.0, not -0.1",
    ("num_fewshot: 0", "num_fewshot: -1"): "9: tasks[1].num_fewshot: must be at least 0, not -1",
    ("limit: 200", "limit: 0"): "9: tasks[1].limit: must be at least 1, not 0",
    ("max_new_tokens: 256", "max_new_tokens: 0"): "14: generation.max_new_tokens: must be at least 1, not 0",
    ("actors: auto", "actors: 0"): "15: cluster.actors: must be at least 1, not 0",
    (
        "gpus_per_actor: auto",
        "gpus_per_actor: -1",
    ): "15: cluster.gpus_per_actor: must be at least 0.0, not -1",
    ("slots: 64", "slots: 0"): "15: cluster.slots: must be at least 1, not 0",
    ("shard_size: 32", "shard_size: 0"): "15: cluster.shard_size: must be at least 1, not 0",
    ("seed: 0", "seed: -1"): "16: seed: must be at least 0, not -1",
    ("seed: 0", "seed: 2147483648"): "16: seed: must be at most 2147483647, not 2147483648",
    ("seed: 0", "seed: " + "9" * 5000): "16: seed: this number is too long",
    ("seed: 0", "seed: 0x" + "f" * 5000): "16: seed: this number is too long",
    ("theta: 1.0", "theta: 0o" + "7" * 5000): "12: methods[1].harp.theta: this number is too long",
    (
        "- gsm8k ",
        "- '' ",
    ): "8: tasks[0].task: must be one line of text, not empty and without blanks around it",
}
MEANING = {
    ("- greedy", "- beam"): (
        "11: methods[0]: method 'beam' is not available in this version; available: greedy, harp"
    ),
    ("- greedy", "- beam: {num_beams: 3}"): (
        "11: methods[0]: method 'beam' is not available in this version; available: greedy, harp"
    ),
    (
        "- greedy",
        "- harp",
    ): "12: methods[1]: method 'harp' is listed twice; give one of them a name of its own",
    ("task: commonsense_qa", "task: gsm8k"): "9: tasks[1]: task 'gsm8k' is listed twice; remove one",
    ("tasks:\n", "  - HuggingFaceTB/SmolLM2-135M-Instruct\ntasks:\n"): (
        "7: models[1]: model 'HuggingFaceTB/SmolLM2-135M-Instruct' is listed twice; remove one"
    ),
    ("baseline: greedy ", "baseline: gredy "): (
        "13: baseline: no method is named 'gredy'; did you mean 'greedy'?"
    ),
    ("baseline: greedy ", "baseline: x "): "13: baseline: no method is named 'x'; known here: greedy, harp",
    ("name: gsm8k ", ""): "2: name: this key is missing",
    ("- ref: HuggingFaceTB/SmolLM2-135M-Instruct ", "- # "): "4: models[0].ref: this key is missing",
}


@pytest.mark.parametrize(("change", "sentence"), (UNKNOWN | STRUCTURE | TYPES | RANGES | MEANING).items())
def test_a_mistake_is_named_with_its_line_and_key(change: tuple[str, str], sentence: str):
    assert refusal(with_change(*change)) == f"jobs/x.yaml:{sentence}"


@pytest.mark.parametrize("key", ["models", "tasks", "methods"])
def test_an_empty_list_is_refused(key: str):
    text = "\n".join(
        f"{k}: {'[]' if k == key else v}"
        for k, v in {"name": "a", "models": "[m]", "tasks": "[t]", "methods": "[greedy]"}.items()
    )
    assert refusal(text).endswith(f"{key}: must not be empty")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "jobs/x.yaml: the job is empty; it needs at least name, models, tasks and methods"),
        ("# nothing\n", "jobs/x.yaml: the job is empty; it needs at least name, models, tasks and methods"),
        ("[]", "jobs/x.yaml:1: must be a mapping (key: value), not a list"),
        ("hello", "jobs/x.yaml:1: must be a mapping (key: value), not 'hello'"),
    ],
)
def test_something_that_is_no_job(text: str, sentence: str):
    assert refusal(text) == sentence


def test_a_message_is_one_short_line_whatever_the_key():
    message = refusal('"\\e[31m\\n\\ud800' + "x" * 5000 + '": 1')
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1e-3", 0.001), ("1E+2", 100.0), (".5", 0.5), ("3", 3.0), ("0x10", 16.0), ("010", 10.0)],
)
def test_numbers_are_those_of_yaml_1_2(written: str, meant: float):
    job = parse_job(with_change("theta: 1.0", f"theta: {written}"))
    assert job.methods[1].settings["theta"] == meant


@pytest.mark.parametrize("word", ["no", "on", "1:30", "2024-01-01", "1_000"])
def test_yaml_1_1_does_not_change_a_word(word: str):
    assert parse_job(with_change("revision: main", f"revision: {word}")).models[0].revision == word


class TestFiles:
    def test_missing(self, tmp_path: Path):
        self.refuses(tmp_path / "no.yaml", "there is no such job file")

    def test_directory(self, tmp_path: Path):
        self.refuses(tmp_path, "this is a directory; name the job file inside it")

    def test_not_utf_8(self, tmp_path: Path):
        path = tmp_path / "latin.yaml"
        path.write_bytes(b"name: a\n# caf\xe9\n")
        with pytest.raises(JobError) as caught:
            load_job(path)
        assert str(caught.value) == f"{path}:2: not UTF-8 text; save the file as UTF-8"

    def test_over_one_mebibyte(self, tmp_path: Path):
        path = tmp_path / "big.yaml"
        path.write_text(JOB + "#" * (1024 * 1024 - len(JOB)))
        assert load_job(path).name == "gsm8k"
        path.write_text(JOB + "#" * (1024 * 1024 - len(JOB) + 1))
        self.refuses(path, "a job file has at most 1 MiB; is this the right file?")

    def test_byte_order_mark_and_windows_line_ends(self, tmp_path: Path):
        path = tmp_path / "windows.yaml"
        path.write_bytes(b"\xef\xbb\xbf" + JOB.replace("\n", "\r\n").encode())
        assert load_job(path) == parse_job(JOB)

    def refuses(self, path: Path, problem: str) -> None:
        with pytest.raises(JobError) as caught:
            load_job(path)
        assert str(caught.value) == f"{path}: {problem}"


class TestOverrides:
    def test_values_change(self):
        job = parse_job(
            JOB, overrides=["cluster.actors=2", "methods.1.harp.theta=2", "tasks.0.limit=5", "name=other"]
        )
        assert (job.cluster.actors, job.name) == (2, "other")
        assert job.methods[1].settings["theta"] == 2.0
        assert [task.limit for task in job.tasks] == [5, 200]

    def test_they_reach_into_short_forms_and_absent_mappings(self):
        job = parse_job(
            SHORTEST, overrides=["models.0.dtype=bfloat16", "methods.0.greedy.name=g", "cluster.slots=8"]
        )
        assert (job.models[0].ref, job.models[0].dtype) == ("m", "bfloat16")
        assert (job.methods[0].name, job.baseline, job.cluster.slots) == ("g", "g", 8)

    def test_a_value_may_be_a_list_and_hold_equals_signs(self):
        job = parse_job(
            JOB, overrides=["methods=[greedy, harp: {theta: 1e-1}]", "models.0.ref=wheel:a==1/b.gguf"]
        )
        assert job.methods[1].settings["theta"] == 0.1
        assert job.models[0].ref == "wheel:a==1/b.gguf"

    def test_the_last_one_wins(self):
        assert parse_job(JOB, overrides=["seed=1", "seed=2"]).seed == 2

    def test_limit_holds_for_every_task(self):
        assert [task.limit for task in parse_job(JOB, limit=7).tasks] == [7, 7]

    @pytest.mark.parametrize(
        ("override", "sentence"),
        [
            ("cluster.actors=x", "--set cluster.actors: must be auto or a number, not 'x'"),
            ("methods.1.harp.thete=2", "--set methods.1.harp.thete: unknown key; did you mean 'theta'?"),
            ("cluster={slots: 0}", "--set cluster: cluster.slots: must be at least 1, not 0"),
            ("clutser.actors=2", "--set clutser.actors: clutser: unknown key; did you mean 'cluster'?"),
            ("tasks.2.limit=2", "--set tasks.2.limit: tasks is a list of 2; give a number from 0 to 1"),
            ("tasks.x.limit=2", "--set tasks.x.limit: tasks is a list of 2; give a number from 0 to 1"),
            ("seed.x=2", "--set seed.x: seed has nothing inside it"),
            ("seed", "--set seed: needs the form KEY=VALUE"),
            ("=3", "--set =3: needs the form KEY=VALUE"),
            ("seed=[1", "--set seed: not valid YAML: expected ',' or ']', but got '<stream end>'"),
            ("seed=0x" + "f" * 5000, "--set seed: this number is too long"),
            (
                "tasks=[t, {limit: &a 1}]",
                (
                    "--set tasks: [1].limit: anchors and aliases (& and *) are not allowed; write the value out"
                ),
            ),
            ("seed=&a 1", "--set seed: anchors and aliases (& and *) are not allowed; write the value out"),
        ],
    )
    def test_mistakes_name_the_option(self, override: str, sentence: str):
        assert refusal(JOB, overrides=[override]) == sentence

    @pytest.mark.parametrize(
        "number", ["1" * 5000, "0" * 5000, "\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT ONE}"]
    )
    def test_a_number_that_is_no_place_in_the_list(self, number: str):
        message = refusal(JOB, overrides=[f"tasks.{number}=t"])
        assert message.startswith("--set tasks.")
        assert message.endswith(": tasks is a list of 2; give a number from 0 to 1")

    def test_a_wrong_limit_names_its_option(self):
        assert refusal(JOB, limit=0) == "--limit: must be at least 1, not 0"


def test_the_reference_shows_a_job_that_loads():
    page = (Path(__file__).resolve().parents[2] / "docs" / "jobs.md").read_text(encoding="utf-8")
    assert parse_job(page.split("```yaml\n")[1].split("```")[0]) == parse_job(JOB)


def test_a_problem_found_later_gets_its_place_in_the_file():
    job = parse_job("name: a\nmodels: [m]\ntasks:\n- t\n- {task: u}\nmethods: [greedy]\n", "jobs/a.yaml")
    with (
        pytest.raises(TaskError, match=r"^jobs/a.yaml:5: tasks\[1\]: there is no task 'u'$"),
        job.blaming("tasks", 1),
    ):
        raise TaskError("there is no task 'u'")


def test_a_problem_found_later_names_the_option_that_it_came_from():
    job = parse_job(SHORTEST, "a.yaml", overrides=["tasks.0=u"])
    with pytest.raises(TaskError, match=r"^--set tasks\.0: no task$"), job.blaming("tasks", 0):
        raise TaskError("no task")


def test_where_a_job_was_written_does_not_make_it_another_job():
    assert parse_job(SHORTEST, "a.yaml") == parse_job("\n\n" + SHORTEST, "b.yaml")
