"""Train and write down each reported step: `python -m tools.drill.train_recorded CONFIG REPORTS`.

A process for the failure drill to end; exit codes as of the command line.
"""

import sys
from pathlib import Path

from la.errors import InputError
from pipelines.config import TrainConfig
from pipelines.training.run import train
from pipelines.training.stop import Stopped

if __name__ == "__main__":
    config = TrainConfig.model_validate_json(Path(sys.argv[1]).read_text())
    with open(sys.argv[2], "a", buffering=1) as reports:
        try:
            train(config, lambda report: print(report["step"], file=reports))
        except InputError as error:
            print("error:", error)
            sys.exit(2)
        except Stopped as stopped:
            print(stopped)
            sys.exit(stopped.exit_code)
