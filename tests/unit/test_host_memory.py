"""How much memory the host has for a run: the machine's, or what a batch system or a container leaves of it."""

from __future__ import annotations

import psutil
import pytest

from offload import config


def test_what_is_available_is_what_the_cgroup_leaves(tmp_path, monkeypatch):
    for name, text in (("max", "9000\n"), ("used", "5000\n"), ("stat", "anon 4000\ninactive_file 700\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(config, "_CGROUPS", ((str(tmp_path), "", ("max", "used", "stat")),))
    assert config.host_available_nbytes() == 4700
    assert config.host_total_nbytes() == 9000
    (tmp_path / "max").write_text("max\n")
    available_nbytes = psutil.virtual_memory().available
    assert config.host_available_nbytes() == pytest.approx(available_nbytes, rel=0.2)
    assert config.host_total_nbytes() == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("line", "controller"), [("0::/slurm/job/step", ""), ("4:cpu,memory:/slurm/job/step", "memory")]
)
def test_the_lowest_limit_on_the_way_to_the_process_own_cgroup_counts(
    tmp_path, monkeypatch, line, controller
):
    """As a batch system's, of a job: neither that of the machine's root nor, here, that of the job's step."""
    (tmp_path / "cgroup").write_text(f"9:name=systemd:/elsewhere\n{line}\n")
    for inside, limit, used in (
        ("", "max", 90_000),
        ("slurm/job", "9000", 8000),
        ("slurm/job/step", "max", 10),
    ):
        (tmp_path / inside).mkdir(parents=True, exist_ok=True)
        (tmp_path / inside / "max").write_text(f"{limit}\n")
        (tmp_path / inside / "used").write_text(f"{used}\n")
        (tmp_path / inside / "stat").write_text("inactive_file 0\ntotal_inactive_file 500\n")
    monkeypatch.setattr(config, "_CGROUPS", ((str(tmp_path), controller, ("max", "used", "stat")),))
    monkeypatch.setattr(config, "_CGROUPS_OF_THIS_PROCESS", str(tmp_path / "cgroup"))
    assert config.host_total_nbytes() == 9000
    assert config.host_available_nbytes() == 1500
