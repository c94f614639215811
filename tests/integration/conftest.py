"""What tests of the command line start from."""

import pytest

from tests.conftest import build
from tests.integration.command_line import TEXT, make_tokenizer


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A model directory and a text; no profile of this machine."""
    monkeypatch.setenv("OFFLOAD_PROFILE", str(tmp_path / "profile.json"))
    build("llama", layers=3).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path
