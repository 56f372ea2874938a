"""The paper as a library, which all services share.

What other libraries read from the environment when they are loaded is set here, because this comes before any of them in every
process of ours. What the operator has set stays.
"""

import os

_ENVIRONMENT = {
    # OpenMP's threads sleep while they wait for one another: those that spin take the cores of whatever else runs on the machine,
    # and of themselves as soon as there are fewer free cores than threads.
    "OMP_WAIT_POLICY": "PASSIVE",
    # TRL tells Hugging Face of every training unless it is asked not to.
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
