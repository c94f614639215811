"""The command line does the whole job, explains refusals, and leaves nothing behind when stopped."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import offload
from offload import _C
from offload.cli import main
from offload.cli.data import IGNORED, TokenStream
from offload.cli.finetune import learning_rate_factor
from offload.errors import ConfigError
from offload.runtime.optimizer import OffloadOptimizer
from tests.integration.command_line import TEXT, finetune, make_tokenizer

transformers = pytest.importorskip("transformers")


def test_finetune_trains_exports_and_reports_as_json(workplace, capsys):
    assert finetune(workplace, "--json", "--output", f"{workplace}/out", "--micro-batches", "2") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("step") for line in lines[:-1]] == [1, 2, 3, 4]
    summary = lines[-1]["summary"]
    assert summary["status"] == "done"
    assert summary["last_loss"] == lines[-2]["loss"] < summary["first_loss"]
    for line in lines[:-1]:
        assert 0 < line["floor_fraction"] <= 1
        assert line["floor_s"] == pytest.approx(line["floor_fraction"] * line["step_s"])
    assert 0 < summary["median_floor_fraction"] <= 1
    assert summary["written_bytes_per_parameter_and_step"] > 0
    assert {"read_bytes", "written_bytes", "stall_s", "tokens_per_s"} <= lines[0].keys()
    assert os.listdir(workplace / "store") == []
    tuned = transformers.AutoModelForCausalLM.from_pretrained(workplace / "out", dtype="auto")
    assert tuned.dtype == torch.float32  # as it was computed in
    tokenizer = transformers.AutoTokenizer.from_pretrained(workplace / "out")
    ids = torch.tensor([tokenizer("to be or not").input_ids])
    assert tuned.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)


def test_the_run_is_the_same_whatever_the_memory(workplace, capsys):
    losses = []
    for memory in ("14900KB", "200MB"):
        assert finetune(workplace, "--json", "--host-memory", memory, "--max-grad-norm", "1.0") == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        losses.append([line["loss"] for line in lines[:-1]])
        assert all(line["grad_norm"] > 0 for line in lines[:-1])
    assert losses[0] == losses[1]


def test_people_get_a_line_a_step_and_a_table(workplace, capsys):
    assert finetune(workplace) == 0
    printed = capsys.readouterr()
    assert "step 4/4" in printed.err
    for word in ("loss", "tokens/s", "s/step", "% of the floor", "waits for", "GB  written", "read"):
        assert word in printed.err
    assert "written bytes per parameter and step" in printed.out


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_removes_its_store(workplace, capsys, monkeypatch, signal_number):
    step = OffloadOptimizer.step
    made = []

    def interrupted(self, closure=None):
        made.append(1)
        if len(made) == 2:
            os.kill(os.getpid(), signal_number)
        return step(self, closure)

    monkeypatch.setattr(OffloadOptimizer, "step", interrupted)
    assert finetune(workplace, "--output", f"{workplace}/out") == 130
    printed = capsys.readouterr()
    assert "after step 1" in printed.err
    assert "interrupted" in printed.out
    assert os.listdir(workplace / "store") == []
    assert not (workplace / "out").exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--model", "nowhere"], 2, "no such directory"),
        (["--data", "nowhere.txt"], 2, "cannot be read"),
        (["--sequence-length", "100000"], 2, "lower --sequence-length"),
        (["--schedule", "wavy"], 2, "constant, linear, cosine"),
        (["--output", "/dev/null/out"], 2, "cannot be written"),
        (["--dtype", "int3"], 2, "auto, bfloat16 or float32"),
        (["--host-memory", "lots"], 2, "8GB"),
        (["--device-memory", "1KB"], 1, "Smallest that would do"),
    ],
)
def test_refusals_say_what_to_change_and_write_nothing(workplace, capsys, more, code, message):
    assert finetune(workplace, *more) == code
    assert message in capsys.readouterr().err
    assert not (workplace / "store").exists() or os.listdir(workplace / "store") == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "cuda:77"], "this torch sees"),
        (["--device", "gpu"], "'cuda:1' or 'emulated'"),
        (["--durability", "always"], "'none', 'checkpoint' or 'step'"),
        (["--max-grad-norm", "-1"], "greater than 0"),
        (["--step-aside", "maybe"], "'auto', 'always' or 'never'"),
        (["--activations", "somewhere"], "'device', 'host', 'storage' or 'keep'"),
        (["--saved-activations", "somewhere"], "'device', 'host' or 'storage'"),
        (["--written-per-step", "lots"], "--written-per-step: memory budget 'lots'"),
        (["--write-budget", "lots"], "--write-budget: memory budget 'lots'"),
        (["--written-per-step", "10%"], "--written-per-step: '10%': there is nothing that this is a part of"),
        (["--write-budget", "-2TB"], "--write-budget: '-2TB': there is nothing that this is a part of"),
        (["--trace", "no/such/place.json"], "make it first"),
        (["--seed", "1" + 24 * "0"], "--seed"),
        (["--save-plan", "."], "is a directory: name a file"),
        (["--data", "x.csv"], "Make JSON lines of it"),
    ],
)
def test_what_is_wrong_in_itself_is_refused_before_anything_is_loaded(workplace, capsys, more, message):
    assert finetune(workplace, *more) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "loading" not in said


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("TSV", "\t")])
def test_a_table_is_refused_with_a_command_that_makes_json_lines_of_it(workplace, capsys, ending, separator):
    table, rows = workplace / f"table.{ending}", workplace / "table.jsonl"
    table.write_text(f"prompt{separator}completion\nto be{separator}or not to be\n" * 8)
    assert finetune(workplace, "--data", str(table)) == 2
    command = capsys.readouterr().err.split("completion: ")[1].strip()
    subprocess.run(command.replace("python -c", f"{sys.executable} -c", 1), shell=True, check=True)
    assert json.loads(rows.read_text().splitlines()[0]) == {"prompt": "to be", "completion": "or not to be"}
    assert finetune(workplace, "--data", str(rows)) == 0


def test_only_completions_are_learned(tmp_path):
    records = [{"prompt": "to be", "completion": "or not"}, {"text": "that is"}]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    tokenizer = make_tokenizer()
    batch = next(TokenStream(str(tmp_path / "data.jsonl"), tokenizer, 8).batches(1, seed=0))
    ids = [*tokenizer("to be or not").input_ids, 0, *tokenizer("that is").input_ids, 0]
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, *ids[2:]]]


@pytest.mark.parametrize("line", ["{", "[]", '{"messages": []}', '{"words": 1}'])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "data.jsonl").write_text('{"text": "to be"}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        TokenStream(str(tmp_path / "data.jsonl"), make_tokenizer(), 2)


def test_sequences_inside_a_prompt_are_left_out_for_their_loss_has_no_value(workplace, capsys):
    records = [{"prompt": "to be or not " * 12, "completion": "that is the question"} for _ in range(3)]
    path = workplace / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    stream = TokenStream(str(path), make_tokenizer(), 16)
    assert (stream.n_sequences, stream.n_left_out) == (2, 7)
    batches = stream.batches(1, seed=0)
    assert all((next(batches)["labels"][:, 1:] != IGNORED).any() for _ in range(6))
    arguments = ["--data", path, "--batch-size", 1, "--host-memory", "100MB", "--device-memory", "100MB"]
    assert finetune(workplace, *map(str, arguments)) == 0
    assert "7 of 9 sequences are left out" in capsys.readouterr().err
    path.write_text("".join(json.dumps(record | {"completion": ""}) + "\n" for record in records))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="none of its 9 sequences of 16 tokens has anything to learn"):
        TokenStream(str(path), tokenizer, 16)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '[\n {"text": "to be"}\n]\n',
            "line 1: is not JSON: Expecting value at column 2; write one whole object a",
        ),
        ('{"instruction": "to", "output": "be"}\n', "found an object with instruction, output"),
        ('[{"text": "to be"}]\n', "found no object"),
    ],
)
def test_a_line_that_cannot_be_learned_is_told_by_what_it_has(tmp_path, content, said):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        TokenStream(str(tmp_path / "data.json"), make_tokenizer(), 2)


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", TEXT), ("a.jsonl", f'{{"text": {json.dumps(TEXT)}}}\n')]
)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name, content):
    """Editors of Windows write one."""
    streams = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_text(content, encoding=encoding)
        streams.append(TokenStream(str(tmp_path / name), make_tokenizer(), 100)._ids)
    assert streams[0] == streams[1]


def test_every_epoch_sees_every_sequence_once(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    stream = TokenStream(str(tmp_path / "text.txt"), make_tokenizer(), 100)
    assert stream.n_sequences == 6
    batches = stream.batches(3, seed=0)
    whole = sorted(row for _ in range(2) for row in next(batches)["input_ids"].tolist())
    assert whole == sorted(list(stream._ids[i * 100 : (i + 1) * 100]) for i in range(6))


def test_learning_rate_schedules():
    assert [learning_rate_factor(i, "constant", 3, 9) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    for schedule in ("linear", "cosine"):
        factors = [learning_rate_factor(i, schedule, 0, 4) for i in range(4)]
        assert factors[0] == 1.0
        assert factors == sorted(factors, reverse=True)
        assert factors[-1] > 0


def test_doctor_names_what_will_be_used(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--storage", str(tmp_path), "--storage", str(tmp_path / "nowhere")])
    text = capsys.readouterr().out
    for word in (
        "I/O backend",
        "O_DIRECT",
        "free",
        "DRAM",
        "GPU",
        "scalar",
        "no such directory",
        "will be used",
    ):
        assert word in text
    with pytest.raises(SystemExit):
        main(["doctor", "--storage", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["drives"][0]["backend"] in ("uring", "posix")
    assert os.listdir(tmp_path) == []


def test_doctor_says_why_io_uring_is_not_used(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_C, "Engine", functools.partial(_C.Engine, backend="posix"))
    with pytest.raises(SystemExit):
        main(["doctor", "--storage", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["drives"][0]["backend"] == "posix"
    with pytest.raises(SystemExit):
        main(["doctor", "--storage", str(tmp_path)])
    assert "I/O backend: posix" in capsys.readouterr().out


def test_doctor_and_a_log_line_advise_float32_where_the_processor_has_no_bf16_products(
    tmp_path, capsys, caplog, monkeypatch
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["doctor", "--storage", str(tmp_path)])
    assert "compute in float32 here" in capsys.readouterr().out
    for dtype in (torch.float32, torch.bfloat16):
        blocks = [torch.nn.Linear(1024, 1024, dtype=dtype) for _ in range(10)]
        model = torch.nn.Sequential(*blocks)
        optimizer = torch.optim.AdamW(model.parameters())
        caplog.clear()
        wrapped, _ = offload.wrap(model, optimizer, device_memory="200MB", host_memory="1GB", storage=[])
        wrapped.offload.close()
        assert ("float32" in caplog.text) == (dtype == torch.bfloat16)


def test_doctor_names_what_killed_runs_have_left(tmp_path, capsys):
    (tmp_path / "offload-20200101-000000-abcdef-0.store").write_bytes(bytes(4096))
    with pytest.raises(SystemExit):
        main(["doctor", "--storage", str(tmp_path)])
    assert "1 store files of runs that have ended" in capsys.readouterr().out


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--storage" in text
    assert "how near a step is to its floor" in text


def test_a_run_stopped_before_its_first_step_reports_valid_json(workplace, capsys, monkeypatch):
    def interrupted(self, closure=None):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(OffloadOptimizer, "step", interrupted)
    assert finetune(workplace, "--json") == 130
    printed = capsys.readouterr()
    summary = json.loads(printed.out.splitlines()[-1], parse_constant=pytest.fail)["summary"]
    assert summary["steps"] == 0
    assert summary["median_step_s"] is None
    assert "before the first step ended" in printed.err
    assert os.listdir(workplace / "store") == []


def test_a_signal_that_python_dropped_still_stops_the_run(workplace, capsys, monkeypatch):
    """An exception raised inside a destructor is printed and forgotten."""
    step = OffloadOptimizer.step

    def swallowing(self, closure=None):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, closure)

    monkeypatch.setattr(OffloadOptimizer, "step", swallowing)
    assert finetune(workplace) == 130
    assert "after step 1" in capsys.readouterr().err


def test_the_package_itself_is_the_command_line():
    ran = subprocess.run([sys.executable, "-m", "offload", "--help"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "finetune" in ran.stdout


def test_a_model_of_diffusers_is_refused_with_what_trains_it(workplace, capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert finetune(workplace, "--model", str(tmp_path)) == 2
    assert "in a loop of your own with offload.load" in capsys.readouterr().err


def test_the_name_of_a_hub_model_is_refused_with_how_to_fetch_it(workplace, capsys):
    assert finetune(workplace, "--model", "HuggingFaceTB/SmolLM2-135M") == 2
    assert "hf download NAME --local-dir DIR" in capsys.readouterr().err
