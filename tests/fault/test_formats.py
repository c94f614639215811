"""Every file we read is read as if an enemy had written it: an OffloadError that names it, and never a crash."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import struct
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import offload
from offload.checkpoint.kept_store import taken_over
from offload.checkpoint.read import read_manifest
from offload.errors import CheckpointError, CorruptError, OffloadError
from offload.tiers.encoding import decode, encode
from offload.tiers.manifest import ENTRIES_MAX, FORMAT_VERSION, MANIFEST_NBYTES_MAX, frame
from tests.fault.trajectory import Run

pytestmark = pytest.mark.fault

KIND = "offload-checkpoint"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, and a kept store."""
    place = tmp_path_factory.mktemp("saved")
    run = Run(storage=[str(place / "store")], durability="step")
    run.model.offload.track(**run.tracked)
    run.steps(2)
    path = run.save(place / "saved")
    run.close()
    return pathlib.Path(path), place / "store"


def body_of(path):
    return json.loads((path / "manifest.jsonl").read_text().splitlines()[1])


def forged(tmp_path, body, kind=KIND):
    """A checkpoint directory whose manifest has this body, with the right checksum."""
    place = tmp_path / "forged"
    place.mkdir(exist_ok=True)
    (place / "manifest.jsonl").write_bytes(frame(kind, json.dumps(body)))
    (place / "extents.bin").write_bytes(bytes(4096))
    return place


def test_a_truncated_manifest_is_refused_at_every_length(tmp_path, saved):
    whole = (saved[0] / "manifest.jsonl").read_bytes()
    place = tmp_path / "cut"
    place.mkdir()
    for nbytes in [0, 1, 10, 60, 100, *range(120, len(whole) - 1, len(whole) // 40), len(whole) - 2]:
        (place / "manifest.jsonl").write_bytes(whole[:nbytes])
        with pytest.raises(CheckpointError, match=r"manifest\.jsonl"):
            read_manifest(str(place))


def test_a_manifest_with_a_flipped_bit_is_refused(tmp_path, saved):
    whole = (saved[0] / "manifest.jsonl").read_bytes()
    place = tmp_path / "flipped"
    place.mkdir()
    for at in range(0, len(whole) - 1, len(whole) // 60):
        (place / "manifest.jsonl").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError):
            read_manifest(str(place))


def test_a_manifest_of_a_newer_version_asks_for_an_upgrade(tmp_path, saved):
    place = forged(tmp_path, body_of(saved[0]))
    first, rest = (place / "manifest.jsonl").read_text().split("\n", 1)
    head = {**json.loads(first), "version": FORMAT_VERSION + 1}
    (place / "manifest.jsonl").write_text(json.dumps(head) + "\n" + rest)
    with pytest.raises(CheckpointError, match=f"version {FORMAT_VERSION + 1}.*upgrade offload"):
        read_manifest(str(place))


def test_an_oversized_manifest_is_not_even_read(tmp_path):
    place = tmp_path / "huge"
    place.mkdir()
    with open(place / "manifest.jsonl", "wb") as file:
        file.truncate(MANIFEST_NBYTES_MAX + 1)
    begin_s = time.perf_counter()
    with pytest.raises(CheckpointError, match="a manifest has at most"):
        read_manifest(str(place))
    assert time.perf_counter() - begin_s < 1
    head = {"format": KIND, "version": 1, "nbytes": 1 << 60, "crc32c": 0}
    (place / "manifest.jsonl").write_text(json.dumps(head) + "\n{}\n")
    with pytest.raises(CorruptError, match=str(1 << 60)):
        read_manifest(str(place))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, saved, make):
    place = tmp_path / "place"
    place.mkdir()
    make(place / "manifest.jsonl")
    with pytest.raises(CheckpointError, match=r"manifest\.jsonl"):
        read_manifest(str(place))
    (manifest,) = saved[1].glob("*.manifest")
    (place / manifest.name).write_bytes(manifest.read_bytes())
    for path in saved[1].glob("*.store"):
        make(place / path.name)
    with pytest.raises(CheckpointError, match=r"\.store|commit record"), taken_over(str(place), []):
        pass


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_manifest_of_a_million_entries_is_refused_soon(tmp_path, saved):
    body = body_of(saved[0])
    entry = {"name": "x", "start": 0, "shape": [], "step": 0}
    body["blocks"][0]["buffers"][0]["parameters"] = [entry] * 1_000_000
    place = forged(tmp_path, body)
    with pytest.raises(CheckpointError, match=f"at most {ENTRIES_MAX}"):
        read_manifest(str(place))


@pytest.mark.parametrize("name", ["../extents.bin", "/etc/passwd", "a/b", "..", ".", "", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, saved, name):
    place = forged(tmp_path, {**body_of(saved[0]), "files": [name]})
    with pytest.raises(CheckpointError, match="bare name"):
        read_manifest(str(place))
    layout = json.loads(next(saved[1].glob("*.manifest")).read_text().splitlines()[1])
    store = tmp_path / "store"
    store.mkdir()
    (store / "offload-x.manifest").write_bytes(
        frame("offload-store", json.dumps({**layout, "files": [name]}))
    )
    with pytest.raises(CheckpointError, match="bare name"), taken_over(str(store), []):
        pass


def first_buffer(body):
    return body["blocks"][0]["buffers"][0]


ATTACKS = {
    "overlapping extents": (lambda b: b["param"].update(offset=b["state"]["offset"]), "overlap"),
    "an extent behind the end": (lambda b: b["param"].update(offset=1 << 40), "misplaced"),
    "an extent between pages": (lambda b: b["param"].update(offset=b["param"]["offset"] + 1), "misplaced"),
    "a negative offset": (lambda b: b["param"].update(offset=-4096), "greater than or equal to 0"),
    "an extent of another length": (
        lambda b: b["param"].update(nbytes=b["param"]["nbytes"] + 4096),
        "misplaced",
    ),
    "too few checksums": (lambda b: b["param"].update(crc32c=""), "0.0 checksums"),
    "checksums that are no base64": (lambda b: b["param"].update(crc32c="%%%%"), "malformed"),
    "an unknown dtype": (lambda b: b.update(dtype="complex512"), "complex512"),
    "a dtype without state": (lambda b: b.update(dtype="int64"), "wrong kind of state"),
    "a trained buffer without state": (lambda b: b.update(state=None), "wrong kind of state"),
    "a parameter behind its buffer": (
        lambda b: b["parameters"][0].update(start=1 << 40),
        "outside its buffer",
    ),
    "an enormous shape": (
        lambda b: b["parameters"][0].update(shape=[1 << 61, 1 << 61]),
        "outside its buffer",
    ),
    "a parameter twice": (lambda b: b["parameters"].append(b["parameters"][0]), "twice"),
    "elements that are no page": (lambda b: b.update(n_elements=7), "no whole number of pages"),
    "a key too many": (lambda b: b.update(surprise=1), "surprise"),
    "text for a number": (lambda b: b.update(n_elements="2048"), "n_elements"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_inconsistent_manifest_is_refused(tmp_path, saved, attack):
    change, expected = ATTACKS[attack]
    body = body_of(saved[0])
    change(first_buffer(body))
    with pytest.raises(CheckpointError, match=expected):
        read_manifest(str(forged(tmp_path, body)))


def test_a_manifest_whose_extents_are_missing_or_short_is_refused(tmp_path, saved):
    place = forged(tmp_path, body_of(saved[0]))
    run = Run(storage=[str(tmp_path / "s")])
    with pytest.raises(CorruptError, match="cut short"):
        run.resume(place)
    os.unlink(place / "extents.bin")
    with pytest.raises(CheckpointError, match=r"extents\.bin.*cannot be read"):
        run.resume(place)
    run.close()


def test_a_training_state_that_is_not_one_is_refused(tmp_path, saved):
    run = Run(storage=[str(tmp_path / "s")])
    for training in (None, 7, {"dict": []}, {"pickle": "x"}, {"dict": [["optimizer", []]]}):
        place = tmp_path / "forged"
        place.mkdir(exist_ok=True)
        (place / "manifest.jsonl").write_bytes(
            frame(KIND, json.dumps({**body_of(saved[0]), "training": training}))
        )
        (place / "extents.bin").write_bytes((saved[0] / "extents.bin").read_bytes())
        with pytest.raises(CheckpointError, match="malformed"):
            run.resume(place)
    run.close()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_plain_data_comes_back_as_it_was(value):
    got = decode(json.loads(json.dumps(encode(value))))
    assert got == value
    assert type(got) is type(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["dict", "tensor", "array", "tuple", "bytes", "float", "counter", "x"]),
        inner,
        max_size=2,
    ),
    max_leaves=12,
)


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_any_json_is_decoded_or_refused(value):
    try:
        decode(value)
    except OffloadError:
        return


def mutated(draw, value):
    """`value` with one place in it replaced, dropped or doubled."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: mutated(draw, value[key])}
    if isinstance(value, list) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], mutated(draw, value[index]), *value[index + 1 :]]
    return draw(JSON | st.integers(-(1 << 70), 1 << 70) | st.just(value))


@given(st.data())
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_fuzzed_manifest_is_read_or_refused(tmp_path, saved, data):
    """Any one entry replaced by anything, with the right checksum: no exception but ours."""
    body = body_of(saved[0])
    body["training"] = None
    try:
        manifest = read_manifest(str(forged(tmp_path, mutated(data.draw, body))))
    except OffloadError as error:
        assert str(error)
        return
    assert manifest.nbytes >= 0


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_a_manifest_are_refused(tmp_path, content):
    place = tmp_path / "bytes"
    place.mkdir(exist_ok=True)
    (place / "manifest.jsonl").write_bytes(content)
    with pytest.raises(OffloadError):
        read_manifest(str(place))


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_fuzzed_store_is_read_or_refused(tmp_path, saved, data):
    (manifest,) = saved[1].glob("*.manifest")
    layout = json.loads(manifest.read_text().splitlines()[1])
    place = tmp_path / "store"
    place.mkdir(exist_ok=True)
    changed = mutated(data.draw, layout)
    (place / manifest.name).write_bytes(frame("offload-store", json.dumps(changed)))
    for path in saved[1].glob("*.store"):
        target = place / path.name
        if not target.exists():
            os.link(path, target)
    try:
        with taken_over(str(place), []) as found:
            assert found.manifest.step in (1, 2)  # without the place of the newest record, the one before it
    except OffloadError as error:
        assert str(error)


def safetensors(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


MALFORMED = {
    "nothing": b"",
    "a truncated header": struct.pack("<Q", 100) + b"{}",
    "an oversized header": struct.pack("<Q", 1 << 62) + b"{}",
    "no json": safetensors(b"not json"),
    "a tensor behind the end": safetensors({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "an offset that goes back": safetensors(
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, bytes(16)
    ),
    "overlapping tensors": safetensors(
        {
            "v": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        },
        bytes(16),
    ),
    "a shape that is too large": safetensors(
        {"w": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 16]}}, bytes(16)
    ),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_safetensors_file_is_refused_with_its_name(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(MALFORMED[kind])
    with pytest.raises(OffloadError, match=r"model\.safetensors"):
        offload.load(str(tmp_path / "model"), storage=[str(tmp_path / "store")])


def test_what_would_need_pickle_is_refused():
    with pytest.raises(OffloadError, match="object"):
        encode(object(), "state")
    with pytest.raises(OffloadError, match="array"):
        encode(np.array([object()]), "state")
    deep = current = []
    for _ in range(100):
        current.append([])
        current = current[0]
    with pytest.raises(OffloadError, match="inside one another"):
        encode(deep)
    assert decode({"bytes": base64.b64encode(b"x").decode()}) == b"x"
