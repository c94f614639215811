"""Profiles of machines: by name, by file, overridden figure by figure; shipped figures say where they come from."""

import json

import pytest

from offload.errors import ConfigError
from offload.planner.hardware import Hardware, load_hardware, override, save_hardware, shipped_profiles


def test_the_machines_people_ask_about_are_there():
    assert set(shipped_profiles()) >= {"rtx4090", "rtx3090", "a100-80g", "h100", "laptop-8gb"}


def figures(profile):
    """Names of all fields that hold numbers; those of drives as `drives.<field>`."""
    for name, value in profile.model_dump(exclude={"sources", "drives"}, exclude_defaults=True).items():
        if isinstance(value, (int, float, dict)) and not isinstance(value, bool):
            yield name
    for drive in profile.drives:
        for name, value in drive.model_dump(exclude_defaults=True).items():
            if isinstance(value, (int, float)):
                yield f"drives.{name}"


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_shipped_figure_has_a_source(name):
    profile = load_hardware(name)
    assert set(figures(profile)) == profile.sources.keys()
    assert len(profile.drives) == 1


@pytest.mark.parametrize("name", shipped_profiles())
def test_derived_figures_follow_the_rules_that_their_sources_state(name):
    profile = load_hardware(name)
    if "fitted" not in profile.sources["adam_params_per_s"]:
        assert profile.adam_params_per_s == pytest.approx(profile.dram_bytes_per_s / 28, rel=1e-6)
    channels, _, rest = profile.sources["dram_bytes_per_s"].partition(" channels x 8 B x ")
    peak_bytes_per_s = int(channels.split()[-1]) * 8 * int(rest.split()[0]) * 1e6
    assert profile.dram_bytes_per_s == pytest.approx(0.8 * peak_bytes_per_s)


# bf16 and fp32 TFLOP/s of the data sheets
SHEETS = {
    "rtx4090": (165.2, 82.6),
    "rtx3090": (71.0, 35.6),
    "a100-80g": (312, 19.5),
    "h100": (989.4, 66.9),
    "laptop-8gb": (29.1, 14.6),
}


@pytest.mark.parametrize("name", SHEETS)
def test_matmul_rates_are_below_the_data_sheets(name):
    rates = load_hardware(name).matmul_flops_per_s
    for dtype, peak in zip(("bfloat16", "float32"), SHEETS[name], strict=True):
        assert 0.7 * peak * 1e12 <= rates[dtype] <= 0.9 * peak * 1e12 * (1 + 1e-9)


def test_a_name_says_how_many_drives():
    one, twelve, none = (load_hardware(f"RTX4090-{n}ssd") for n in (1, 12, 0))
    assert (len(one.drives), len(twelve.drives), len(none.drives)) == (1, 12, 0)
    assert twelve.drives[0] == twelve.drives[11] == one.drives[0]
    assert twelve.drives[0].read_bytes_per_s == 6.5e9
    assert twelve.drives[0].write_bytes_per_s == 3.4e9
    assert "12 drives" in twelve.name
    assert load_hardware("a100-80g-4ssd").device_memory_nbytes == 80 * 2**30


def test_any_figure_can_be_overridden_and_says_so():
    profile = load_hardware(
        "rtx4090-3ssd",
        [
            "drives.0.read_bytes_per_s=7e9", "drives.*.write_bytes_per_s=1e9", "matmul_flops_per_s.bfloat16=1.5e14",
            "h2d_duplex_bytes_per_s=11e9", "shares_host=true", "name=mine", "drives.2.endurance_nbytes=null",
        ],
    )  # fmt: skip
    assert [d.read_bytes_per_s for d in profile.drives] == [7e9, 6.5e9, 6.5e9]
    assert [d.write_bytes_per_s for d in profile.drives] == [1e9] * 3
    assert [d.endurance_nbytes for d in profile.drives] == [7e15, 7e15, None]
    assert profile.matmul_flops_per_s["bfloat16"] == 1.5e14
    assert (profile.h2d_duplex_bytes_per_s, profile.shares_host, profile.name) == (11e9, True, "mine")
    assert profile.sources["drives.0.read_bytes_per_s"] == "override"
    assert load_hardware("rtx4090-3ssd").drives[0].read_bytes_per_s == 6.5e9


BY_NAME = ("matmul_flops_per_s", "work_flops_per_s", "update_params_per_s")


@pytest.mark.parametrize("field", BY_NAME)
def test_a_rate_with_a_name_can_be_added(field):
    assert getattr(load_hardware("h100", [f"{field}.some=3e9"]), field)["some"] == 3e9


@pytest.mark.parametrize("field", [f for f in Hardware.model_fields if f.endswith(("_s", "_nbytes"))])
def test_every_number_of_a_profile_has_its_override(field):
    value = {"some": 3.0} if field in BY_NAME else 3
    assert getattr(load_hardware("h100", [f"{field}={json.dumps(value)}"]), field) == value


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("rtx9999", [], "rtx4090"),
        ("rtx4090-100ssd", [], "at most 64"),
        ("nowhere.json", [], "no such file"),
        ("rtx4090", ["dram_bytes_per_s"], "key=value"),
        ("rtx4090", ["=3"], "key=value"),
        ("rtx4090", ["drams=3"], "drams"),
        ("rtx4090", ["dram_bytes_per_s=fast"], "dram_bytes_per_s"),
        ("rtx4090", ["dram_bytes_per_s=-1"], "greater than 0"),
        ("rtx4090", ["dram_bytes_per_s=NaN"], "dram_bytes_per_s"),
        ("rtx4090", ["matmul_flops_per_s.bfloat16=0"], "bfloat16"),
        ("rtx4090", ["update_params_per_s.lion_fp32=-1"], "update_params_per_s.lion_fp32 is -1"),
        ("rtx4090-2ssd", ["drives.2.read_bytes_per_s=1"], "2 drives"),
        ("rtx4090", ["drives.x.read_bytes_per_s=1"], "1 drives"),
        ("rtx4090-0ssd", ["drives.*.read_bytes_per_s=1"], "0 drives"),
        ("rtx4090", ["drives.0=1"], "drives"),
        ("rtx4090", ["drives.0.speed=1"], "speed"),
        ("rtx4090", ["name.first=1"], "single figure"),
        ("rtx4090", ["fans.0=1"], "fans"),
    ],
)
def test_mistakes_are_named(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_hardware(name, overrides)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"name": "x"}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.json|Field required"):
        load_hardware(str(tmp_path / "mine.json"))


def test_a_profile_survives_its_file(tmp_path):
    profile = override(load_hardware("a100-80g-2ssd"), ["step_overhead_s=0.25"])
    path = tmp_path / "made" / "here" / "mine.json"
    save_hardware(profile, str(path))
    assert load_hardware(str(path)) == profile
    assert [p.name for p in path.parent.iterdir()] == ["mine.json"]
    with pytest.raises(ConfigError, match="cannot be written"):
        save_hardware(profile, str(path / "below.json"))
