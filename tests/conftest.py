"""Every run sees the same: properties are tried on the same examples, however slow the machine is.

`pytest --hypothesis-profile default` looks for new ones.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

# What tests start and ask is on this machine, whatever proxy leads out of it.
for variable in ("no_proxy", "NO_PROXY"):
    os.environ[variable] = ",".join(
        filter(None, ("127.0.0.1", "localhost", os.environ.get(variable)))
    )
