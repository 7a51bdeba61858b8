"""tests/simulate.py: what it is asked for wrongly it refuses in one line."""
import pytest
from conftest import user


@pytest.mark.parametrize("options, words", [
    (("--size", 0), "--size: 0 is not above 0"), (("--seed", -1), "--seed: 0 or above"),
    (("--size", 24), "holds other data: remove it or choose another folder")])
def test_it_refuses(options, words, tmp_path):
    small = ("--scenes", 1, "--patches", 1, "--dfc-train", 1, "--dfc-test", 1)
    if "other data" in words:
        assert user("tests/simulate.py", tmp_path, "--size", 16, *small).returncode == 0
    result = user("tests/simulate.py", tmp_path, *small, *options)
    assert result.returncode == 2 and words in result.stderr.splitlines()[-1]
