"""The command line of lm-evaluation-harness, with the zoo's models registered as "zoo".

python -m tools.evaluation.harness --model zoo --model_args name=NAME --tasks arc_easy
"""

from lm_eval.__main__ import cli_evaluate

import tools.evaluation.harness.model  # noqa: F401  # registers itself

if __name__ == "__main__":
    cli_evaluate()
