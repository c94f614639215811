"""The probe gives the rates of a plain measurement, writes no more than it was told, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from offload.cli import main
from offload.errors import ConfigError, StoreError
from offload.model.on_meta import model_on_meta
from offload.planner.hardware import load_hardware
from offload.planner.rates import rates_of
from offload.profiling import compute_probe, model_probe, storage_probe
from offload.profiling import probe as probe_room
from offload.profiling.model_probe import model_rates
from offload.profiling.probe import probe
from offload.profiling.storage_probe import probe_drives
from offload.profiling.stored import profile_path, stored_hardware
from offload.tiers.device import CudaDevice
from offload.tiers.emulated_device import EmulatedDevice
from offload.tiers.storage import Store
from offload.update_rules import ADAMW
from tests.conftest import slow_but

SMALLEST = 64_000_000
TINY = ((64, 64),)


def written_by_this_process_nbytes():
    """What the kernel says was sent to storage; None where it does not say."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return int(dict(line.split(": ") for line in file.read().splitlines())["write_bytes"])
    except OSError:
        return None


@pytest.mark.parametrize("n_drives", [1, 3])
def test_no_more_is_written_than_allowed_and_no_file_stays(tmp_path, monkeypatch, n_drives):
    directories = [str(tmp_path / str(i)) for i in range(n_drives)]
    for directory in directories:
        os.mkdir(directory)
    engines = []
    close = Store.close
    monkeypatch.setattr(Store, "close", lambda store: (engines.append(store.engine.counters()), close(store)))
    before = written_by_this_process_nbytes()
    limit_nbytes = 126_000_000
    drives, together, _ = probe_drives(
        directories, written_nbytes_max=limit_nbytes, seconds=6, note=lambda text: None
    )
    by_engine_nbytes = sum(counters["written_bytes"] for counters in engines)
    assert 0.2 * n_drives * limit_nbytes < by_engine_nbytes <= n_drives * limit_nbytes
    if before is not None:
        metadata_nbytes = n_drives * 8_000_000
        assert written_by_this_process_nbytes() - before <= n_drives * limit_nbytes + metadata_nbytes
    assert [os.listdir(directory) for directory in directories] == [[]] * n_drives
    assert (together is None) == (n_drives == 1)
    assert [drive.name for drive in drives] == directories
    for drive in drives:
        assert drive.read_bytes_per_s > 0
        assert drive.write_bytes_per_s > 0
        assert drive.mixed_bytes_per_s > 0
        assert drive.capacity_nbytes > limit_nbytes


def plain_rates(path, nbytes):
    """Bytes a second of one process that writes, flushes, and reads through the page cache, block by block."""
    block = os.urandom(1 << 20)
    with open(path, "wb", buffering=0) as file:
        for _ in range(nbytes >> 20):
            file.write(block)
        os.fsync(file.fileno())
        start = time.perf_counter()
        file.seek(0)
        for _ in range(nbytes >> 20):
            file.write(block)
        os.fsync(file.fileno())
        write_s = time.perf_counter() - start
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while file.read(1 << 20):
            pass
        read_s = time.perf_counter() - start
    os.unlink(path)
    return nbytes / read_s, nbytes / write_s


def test_storage_rates_are_of_the_size_of_a_plain_measurement(tmp_path):
    (drive,), _, is_direct = probe_drives(
        [str(tmp_path)], written_nbytes_max=400_000_000, seconds=8, note=lambda text: None
    )
    read, write = plain_rates(tmp_path / "plain", 96 << 20)
    if is_direct:
        assert 0.2 * read < drive.read_bytes_per_s < 50 * read
    assert 0.2 * write < drive.write_bytes_per_s < 50 * write
    slower, faster = sorted((drive.read_bytes_per_s, drive.write_bytes_per_s))
    assert 0.2 * slower < drive.mixed_bytes_per_s < 4 * (slower + faster)


def test_memory_rates_are_of_the_size_of_a_plain_measurement():
    copied, target = (torch.full((64 << 20,), value, dtype=torch.uint8) for value in (1, 2))
    seconds = compute_probe._repeat(lambda: target.copy_(copied), 0.2)
    plain = 2 * copied.nbytes / min(seconds)
    assert 0.2 * plain < compute_probe.dram_bytes_per_s(0.2) < 10 * plain


def test_adam_rates_are_of_the_size_of_torchs_fused_adam():
    parameter = torch.nn.Parameter(torch.ones(1 << 23))
    parameter.grad = torch.ones(1 << 23)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    plain = parameter.numel() / min(compute_probe._repeat(optimizer.step, 0.3))
    assert 0.2 * plain < compute_probe.update_params_per_s(0.3) < 20 * plain


@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.float32, torch.bfloat16]))
def test_matmul_rates_are_of_the_size_of_one_square_product(dtype):
    side = 1024
    a, b = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
    plain = [2 * side**3 / min(compute_probe._repeat(lambda: a @ b, 0.3))]
    found = compute_probe.matmul_flops_per_s([(side, side)], side, dtype, torch.device("cpu"), 0.5)
    plain.append(2 * side**3 / min(compute_probe._repeat(lambda: a @ b, 0.3)))  # others may compute beside it
    assert 0.1 * min(plain) < found < 3 * max(plain)


def test_matrices_are_those_of_a_block():
    assert compute_probe.matmul_shapes(model_on_meta("llama-70b")) == (
        (8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192),
    )  # fmt: skip


def test_a_profile_is_complete_and_survives_its_file(tmp_path, monkeypatch):
    notes = []
    profile = probe(
        [str(tmp_path)], shapes=TINY, written_nbytes_max=SMALLEST, seconds=1.0, name="here", note=notes.append
    )
    assert profile.name == "here"
    assert profile.shares_host == (not torch.cuda.is_available())
    assert set(profile.matmul_flops_per_s) == {"bfloat16", "float32"}
    assert profile.host_memory_nbytes > 1 << 28
    assert len(notes) >= 4
    assert (
        28 * profile.adam_params_per_s <= profile.dram_bytes_per_s
    )  # or a plan finds the update slower than it is
    monkeypatch.setenv("OFFLOAD_PROFILE", str(tmp_path / "kept" / "profile.json"))
    with pytest.raises(ConfigError, match="offload probe"):
        stored_hardware()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "profile.json").write_text(profile.model_dump_json())
    assert stored_hardware() == profile
    assert stored_hardware(("dram_bytes_per_s=5e9",)).dram_bytes_per_s == 5e9


def test_the_place_of_the_profile(monkeypatch):
    monkeypatch.delenv("OFFLOAD_PROFILE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/somewhere")
    assert profile_path() == "/somewhere/offload/hardware.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert profile_path() == "/home/me/.config/offload/hardware.json"


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        probe([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="twice"):
        probe([str(tmp_path), f"{tmp_path}/."])
    with pytest.raises(ConfigError, match="seconds"):
        probe(seconds=0)
    with pytest.raises(ConfigError, match="too low"):
        probe_drives([str(tmp_path)], written_nbytes_max=10_000_000, seconds=1, note=lambda text: None)
    with pytest.raises(StoreError, match="free"):
        probe_drives([str(tmp_path)], written_nbytes_max=10**18, seconds=1, note=lambda text: None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fails_at", [1, 5, 20])
def test_a_failing_drive_leaves_no_file(tmp_path, monkeypatch, fails_at):
    submit = storage_probe._Mover._submit
    calls = []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == fails_at:
            raise OSError(5, "Input/output error")
        return submit(self, *arguments)

    monkeypatch.setattr(storage_probe._Mover, "_submit", failing)
    with pytest.raises(OSError, match="Input/output"):
        probe_drives([str(tmp_path)], written_nbytes_max=SMALLEST, seconds=1, note=lambda text: None)
    assert os.listdir(tmp_path) == []


def run_cli(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["probe", *arguments])
    return stopped.value.code or 0


@pytest.fixture
def small_probe(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFLOAD_PROFILE", str(tmp_path / "config" / "profile.json"))
    monkeypatch.setattr(compute_probe, "_UPDATE_NUMEL", 1 << 20)
    monkeypatch.setattr(model_probe, "TOKENS_MAX", 16)
    (tmp_path / "drive").mkdir()
    return tmp_path


@pytest.mark.slow
def test_the_command_measures_stores_and_shows(small_probe, capsys):
    drive, kept = str(small_probe / "drive"), small_probe / "config" / "profile.json"
    options = ["--storage", drive, "--write-limit", "70MB", "--seconds", "1", "--model", "smollm2-135m"]
    assert run_cli(*options, "--override", "drives.0.endurance_nbytes=1.2e15", "--name", "mine") == 0
    printed = capsys.readouterr()
    for word in ("mine", "DRAM", "AdamW", "TFLOP/s", "read", "both", str(kept)):
        assert word in printed.out
    assert f"measuring storage {drive}" in printed.err
    assert load_hardware(str(kept)).drives[0].endurance_nbytes == 1.2e15
    assert_has_block_rates(load_hardware(str(kept)))
    assert os.listdir(drive) == []
    other = str(small_probe / "other.json")
    assert run_cli("--seconds", "0.5", "--model", "smollm2-135m", "--json", "--output", other) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((small_probe / "other.json").read_text())
    with pytest.raises(SystemExit):
        main(["doctor", "--storage", drive])
    assert f"mine (probe of {time.strftime('%Y')}" in capsys.readouterr().out


def assert_has_block_rates(profile):
    """Of every kind of work, and used for models of that dtype alone."""
    assert set(profile.work_flops_per_s) == {
        "forward", "recompute", "backward", "root_forward", "root_backward",
    }  # fmt: skip
    width = {"float32": 4, "bfloat16": 2}[profile.work_dtype]
    assert rates_of(profile, width).work_flops_per_s == profile.work_flops_per_s
    assert rates_of(profile, 6 - width).work_flops_per_s == {}


@pytest.mark.slow
def test_blocks_are_timed_from_shapes_and_the_model_is_left_as_it_was():
    model = model_on_meta("smollm2-135m")
    names = [name for name, _ in model.named_modules()]
    found = model_rates(model, {"bfloat16": 1e9, "float32": 1e9})
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.is_meta for parameter in model.parameters())
    assert min(found["work_flops_per_s"].values()) > 0
    assert 0 < found["compute_speed_beside_update"] <= 1


def test_blocks_that_would_take_too_much_memory_are_not_timed():
    with pytest.raises(ConfigError, match="GB to measure"):
        model_rates(model_on_meta("llama-405b"), {"bfloat16": 1e9})


def test_a_profile_by_hand_starts_from_one_that_comes_with_the_library(small_probe, capsys):
    assert run_cli("--from", "rtx4090-2ssd", "--override", "drives.1.read_bytes_per_s=1e9") == 0
    assert "1.00 GB/s" in capsys.readouterr().out
    assert not (
        small_probe / "config"
    ).exists()  # the machine's own profile is not replaced by another machine's
    mine = str(small_probe / "mine.json")
    assert run_cli("--from", "rtx4090-2ssd", "--name", "my box", "--output", mine) == 0
    assert load_hardware(mine).name == "my box"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "rtx1"], "rtx4090"),
        (["--from", "rtx4090", "--model", "7b"], "leave --storage"),
        (["--write-limit", "50%"], "500MB"),
        (["--write-limit", "1MB", "--storage", "."], "too low to measure with"),
        (["--output", "/dev/null/profile.json"], "choose another"),
        (["--model", "no-such-model"], "gpt3-13b"),
        (["--storage", "/nowhere/at/all"], "no such directory"),
    ],
)
def test_refusals_of_the_command(small_probe, capsys, options, message):
    assert run_cli(*options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "measuring" not in said
    assert not (small_probe / "config").exists()


def test_doctor_says_that_there_is_no_profile_or_that_it_is_damaged(small_probe, capsys):
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert "offload probe" in capsys.readouterr().out
    (small_probe / "config").mkdir()
    (small_probe / "config" / "profile.json").write_text("{")
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert "cannot be used" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_probe_removes_its_files(tmp_path, signal_number):
    drive = tmp_path / "drive"
    drive.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "offload.cli", "probe", "--storage", str(drive), "--model", "smollm2-135m",
         "--seconds", "10"],
        env={**os.environ, "OFFLOAD_PROFILE": str(tmp_path / "profile.json")},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    for line in process.stderr:
        if "storage" in line:
            break
    end = time.monotonic() + 10
    while not os.listdir(drive) and time.monotonic() < end:
        time.sleep(0.01)
    assert os.listdir(drive)
    time.sleep(0.3)
    process.send_signal(signal_number)
    rest = process.stderr.read()
    assert process.wait(timeout=30) == 130
    assert "interrupted" in rest
    assert os.listdir(drive) == []
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.slow
def test_a_probe_with_its_defaults_takes_less_than_a_minute(tmp_path):
    start = time.perf_counter()
    probe([str(tmp_path)])
    assert time.perf_counter() - start < 60
    assert probe_room.SECONDS < 60
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_every_rule_of_update_has_its_rate():
    """Plain SGD keeps nothing. Which AdamW is the faster depends on cores and memory: 8-bit moments are fewer bytes."""
    rules = {rule.key: rule for rule in compute_probe.other_rules()}
    assert len(rules) == 9
    assert {"adamw_bf16", "adamw_8bit", "lion_fp32", "sgd_8bit", "sgd"} <= set(rules)
    loops = {
        key: compute_probe.UpdateLoop(rule=rules.get(key, ADAMW)) for key in ("sgd", "adamw", "adamw_8bit")
    }
    seconds = dict.fromkeys(loops, float("inf"))
    try:
        for _ in range(12):  # in turns, the best of each: other work on the machine slows single updates
            for key, loop in loops.items():
                start = time.perf_counter()
                loop.update()
                seconds[key] = min(seconds[key], (time.perf_counter() - start) / loop.numel)
    finally:
        for loop in loops.values():
            loop.close()
    assert seconds["sgd"] < min(seconds["adamw"], seconds["adamw_8bit"])


@pytest.mark.parametrize("rate", [1e8, 4e8])
def test_bus_rates_are_those_of_the_bus(rate):
    """Of an emulated device: each direction at the rate that it was given, alone and beside the other. Other work on
    the machine makes it slower, never faster: one time of three has to be undisturbed."""
    device = EmulatedDevice(rate)
    times = [compute_probe.bus_bytes_per_s(device, 0.1, copy_nbytes=4 << 20) for _ in range(3)]
    device.close()
    for found in times:
        assert set(found) == {f"{way}{at}_bytes_per_s" for way in ("h2d", "d2h") for at in ("", "_duplex")}
        assert max(found.values()) <= rate
    for name in times[0]:
        assert max(found[name] for found in times) > 0.7 * rate


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bus_rates_alone_are_not_below_those_at_once():
    device = CudaDevice(torch.device("cuda"), torch.cuda.get_device_properties(0).total_memory)
    rates = compute_probe.bus_bytes_per_s(device, 1.0)
    device.close()
    for direction in ("h2d", "d2h"):
        alone, both = rates[f"{direction}_bytes_per_s"], rates[f"{direction}_duplex_bytes_per_s"]
        assert 1e9 < both < 1.1 * alone < 1e12
