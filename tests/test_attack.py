"""Run `benchmarks/attack.py` for a minute: no mutant crashes a decoder, hangs it, or fills the memory."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "attack.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("target", "seconds"), [("frame", 20), ("stream", 10), ("codec", 10), ("store", 10), ("kill", 10)]
)
def test_nothing_is_found(target, seconds):
    command = [sys.executable, str(SCRIPT), "--target", target, "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(",")[0].split(": ")[1].split()[0].replace("_", "")) > 0


@pytest.mark.slow
def test_findings_are_reported(tmp_path):
    """The script reports a decoder that fails on purpose."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import attack\n"
        "def fail(random, *, harmless=False):\n"
        "    if not harmless: raise IndexError('too far')\n"
        "attack.ATTACKS['frame'] = fail\n"
        "if __name__ == '__main__':\n"
        "    sys.argv = ['attack.py', '--target', 'frame', '--mutants', '3']\n"
        "    attack.main()\n"
    )
    done = subprocess.run([sys.executable, str(broken)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "mutant 2: IndexError: too far (broken.py:4)" in done.stdout
