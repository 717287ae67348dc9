"""Every run sees the same: properties are tried on the same examples, however slow the machine is.

`pytest --hypothesis-profile default` looks for new ones.
"""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")
