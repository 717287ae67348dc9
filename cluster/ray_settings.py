"""Settings of Ray for clusters on which no request goes through it."""

from __future__ import annotations

# Serve wakes every replica, and its controller, ten times a second: to tell Prometheus of requests
# that went through it, and to see whether there is something to do. A replica that idles so needs
# half as much CPU again, and there may be hundreds.
SERVE_SETTINGS = {
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    # What is another version to Serve is here another deployment, and a change of this one only its
    # bounds or aliases: replicas that start on hosts that die are no reason to give it up for good.
    "RAY_SERVE_STOP_FAILED_ROLLING_UPDATES": "0",
    # What `ray list tasks` shows, of calls that each replica answers: sent every ten seconds, not one.
    "RAY_task_events_report_interval_ms": "10000",
}
# Output of workers, sent to whoever runs `ray.init` with `log_to_driver`: a process on each node that
# looks at every log file. bora does not ask for it; `bora logs` reads the files where they are.
NO_LOG_MONITOR = "--include-log-monitor=false"
