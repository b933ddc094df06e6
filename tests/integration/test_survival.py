"""A case of the failure drill, which is held whole by `make drill`."""

import pytest
from rich.console import Console

from tools.drill.run_drill import drill


@pytest.mark.timeout(300)
def test_a_killed_train_worker_costs_no_more_than_the_steps_since_the_checkpoint():
    console = Console(record=True, width=120)
    assert drill(["train-worker"], console)
    assert "equal" in console.export_text()
