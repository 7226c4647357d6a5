from pathlib import Path

import pytest
import yaml

RECIPE = {
    "name": "toy",
    "seed": 3,
    "stages": [
        {"name": "one", "verb": "write", "options": {"source": "sea"}},
        {"name": "two", "verb": "write", "options": {"source": "sky"}},
        {"name": "both", "verb": "join", "reads": {"left": "one", "right": "two"}},
        {"name": "model", "verb": "train", "reads": {"data": "both"}},
    ],
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe in an empty working folder: `recipe()` the plain one, `recipe(text)` another."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | None = None) -> Path:
        path = Path("toy.yaml")
        path.write_text(yaml.safe_dump(RECIPE, sort_keys=False) if text is None else text)
        return path

    return write
