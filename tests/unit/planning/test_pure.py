"""Plans are made without torch."""

import subprocess
import sys
from pathlib import Path

import comet_megatron.planning


def test_no_module_of_planning_loads_torch():
    folder = Path(comet_megatron.planning.__file__).parent
    names = [f"comet_megatron.planning.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    assert len(names) > 10
    program = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folder.parents[1])
