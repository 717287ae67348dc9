"""Load on the public HTTP API: locust users, and what they measure. Knows nothing behind the API."""
